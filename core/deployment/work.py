"""Makes the document of `core.placement`: finds loads, plans, and says what the plan gains."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.assemble import build
from core.contracts.errors import NotFiniteError, UserError
from core.contracts.schema import sections_in
from core.deployment.effect import (
    TIME_MODEL,
    AtLag,
    LoadByLayer,
    all_in_order,
    balancedness,
    by_lag,
    by_plan,
    good_for,
    over_layers,
    step_gain,
)
from core.deployment.loads import RecordedLoads, read_loads
from core.deployment.plan import PlacementPlan, plan_placement
from core.generation.run_tokenizer import RunTokenizer
from core.inspection.texts import Text, held_out, of_file
from core.interop.run_weights import check_average
from core.model.language_model import LanguageModel
from core.model.trace import trace_context
from core.recipe.compose import Recipe, compose_run
from core.run.device import check_device
from core.run.loading import load, run_of
from core.training.early_checks import check_trained
from core.training.resume import newest_checkpoint
from core.training.run_folder import RunFolder

LARGEST = 100_000
"""GPUs, nodes, replicas, groups and stretches of a plan, and not more: plans are lists of Python."""

SCHEMA = 1
"""The version of the document; it rises when a key changes its meaning or is removed."""


@dataclass(frozen=True)
class PlacementOptions:
    """What to plan from, and for what.

    Args:
        gpus: GPUs over which the experts of a layer are divided.
        nodes: machines with equally many of them.
        replicas: physical experts of a layer; None: one more on each GPU than are needed.
        groups: groups of experts of which a token reaches some only; None: as the run's router says, else 1.
        text: the file that the model reads for its loads; None: loads that are recorded already.
        held_out: whether the model reads the run's held-out documents instead, as `core.evaluate` does.
        tokens: the number of tokens at which the reading stops.
        stretches: into how many stretches the loads are divided, for how long a plan stays good.
        experts_share: part of a balanced step that is the time of routed experts; None: as FLOPs say, for a run.
        device: where the model runs.
        weights: the name of averaged weights; None: those that were trained.
        trust: whether the recipe of a run that was made elsewhere may name modules, which then run.
    """

    gpus: int = 8
    nodes: int = 1
    replicas: int | None = None
    groups: int | None = None
    text: Path | None = None
    held_out: bool = False
    tokens: int = 200_000
    stretches: int = 8
    experts_share: float | None = None
    device: str = "cpu"
    weights: str | None = None
    trust: bool = False

    @property
    def reads(self) -> bool:
        """Whether the model reads something for its loads."""
        return self.text is not None or self.held_out

    def check(self) -> None:
        """Raises `UserError` for the first number that is out of range, or for two texts."""
        if self.text is not None and self.held_out:
            raise UserError("--held-out cannot be combined with --text: both say what is read")
        for name in ("gpus", "nodes", "replicas", "groups", "stretches"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= LARGEST:
                raise UserError(f"--{name} = {value}: must be from 1 to {LARGEST}")
        if self.tokens < 1:
            raise UserError(f"--tokens = {self.tokens}: must be at least 1")
        if self.gpus % self.nodes:
            raise UserError(f"--gpus = {self.gpus}: must be a multiple of --nodes = {self.nodes}")
        if self.replicas is not None and self.replicas % self.gpus:
            raise UserError(
                f"--replicas = {self.replicas}: must be a multiple of --gpus = {self.gpus}, so that every GPU has "
                "equally many experts"
            )
        share = self.experts_share
        if share is not None and not 0 <= share <= 1:
            raise UserError(f"--experts-share = {share}: must be from 0 to 1")


@dataclass(frozen=True)
class PlacementReport:
    """The result: the folder of the run or file, the plan, and the JSON document."""

    folder: Path
    plan: PlacementPlan
    document: dict[str, Any]


def report(
    source: Path, options: PlacementOptions, *, say: Callable[[str], None] = lambda _: None
) -> PlacementReport:
    """Plans a placement for a run or a file of loads; mistakes are found before a model is loaded.

    Raises:
        UserError: no loads there, loads that cannot be, or sizes that are impossible.
        NotFiniteError: a weight that is not finite.
    """
    options.check()
    if source.suffix in (".safetensors", ".json", ".npy") and not source.is_dir():
        if options.reads:
            flag = "--text" if options.text is not None else "--held-out"
            raise UserError(f"{flag} needs a run or a checkpoint, and {source} holds loads")
        loads = read_loads(source)
        folder = source.parent
        share = options.experts_share
    else:
        run = _run_of(source, options)
        recipe = compose_run(run.folder.recipe, trust=options.trust, check_source=options.held_out)
        for notice in recipe.notices():
            say(f"note: {notice}")
        meta = build(recipe, device="meta")
        groups = options.groups or _groups_of(recipe)
        _check_layers(meta, options, groups)
        loads = replace(_loads_of_run(run, recipe, options), groups=groups)
        folder = run.folder.path
        share = options.experts_share
        if share is None:
            share = experts_share(meta)
    return _reported(folder, loads, options, share)


@dataclass(frozen=True)
class _Run:
    """A run that was found; the checkpoint only where a model is to read a text."""

    folder: RunFolder
    checkpoint: Path | None


def _run_of(source: Path, options: PlacementOptions) -> _Run:
    """Finds a run, and checks what of it is needed."""
    if not options.reads:
        folder = RunFolder(source) if (source / "recipe.yaml").exists() else None
        if folder is None:
            folder = run_of(newest_checkpoint(source))
        if options.weights is not None:
            raise UserError(
                "--weights needs --text or --held-out: recorded loads are those of the training"
            )
        if not (folder.path / "loads.safetensors").exists():
            raise UserError(
                f"{folder.path}: has no loads.safetensors, as every run that trains experts writes; "
                "--text FILE counts the loads of a text"
            )
        return _Run(folder, None)
    checkpoint = newest_checkpoint(source)
    if options.weights is not None:
        check_average(checkpoint, options.weights)
    if options.held_out:
        check_trained(run_of(checkpoint), "give a text by --text")
    return _Run(run_of(checkpoint), checkpoint)


def _check_layers(model: LanguageModel, options: PlacementOptions, groups: int) -> None:
    """Raises `UserError` if sizes are impossible for a layer, before anything is read."""
    layers = model.expert_layers()
    if not layers:
        raise UserError("the run's model has no experts: all of its feed-forward layers are dense")
    even = {path: [1.0] * layer.experts for path, layer in layers.items()}
    _planner(options, groups)(even)


def _planner(options: PlacementOptions, groups: int) -> Callable[[LoadByLayer], PlacementPlan]:
    """Plans from loads by layer, with the options' sizes."""

    def plan(loads: LoadByLayer) -> PlacementPlan:
        try:
            return plan_placement(
                loads,
                gpus=options.gpus,
                nodes=options.nodes,
                replicas=options.replicas,
                groups=groups,
            )
        except UserError as cause:
            raise UserError(f"--{cause}") from cause

    return plan


def _groups_of(recipe: Recipe) -> int:
    """The number of groups of the recipe's routers, if they agree on one; else 1."""
    found = set()
    for section in sections_in(recipe.model):
        if section.slot != "router":
            continue
        capabilities = section.component.capabilities_of(section.config)
        found.add(section.config.groups if "groups" in capabilities else 1)
    return found.pop() if len(found) == 1 else 1


def _loads_of_run(run: _Run, recipe: Recipe, options: PlacementOptions) -> RecordedLoads:
    """The recorded loads of a run, or those of a text that its model reads."""
    if run.checkpoint is None:
        return read_loads(run.folder.path / "loads.safetensors")
    check_device(options.device, recipe)
    text = _text(run, recipe, options)
    model = load(run.checkpoint, trust=options.trust, weights=options.weights).to(options.device)
    traces = (trace_context(model, context) for context in text.on(options.device))
    try:
        return RecordedLoads.of_traces(traces, text.name)
    except NotFiniteError as cause:
        raise NotFiniteError(f"{run.checkpoint}: {cause}") from cause


def _text(run: _Run, recipe: Recipe, options: PlacementOptions) -> Text:
    """The tokens that the model reads."""
    if options.text is None:
        return held_out(recipe, run.folder, options.tokens)
    length = min(recipe.data.sequence_length, recipe.model.rope.max_length, 4096)
    vocabulary = recipe.data.tokenizer.vocab
    tokenizer = RunTokenizer.of(run.folder)
    return of_file(options.text, tokenizer, length, vocabulary, options.tokens)


def experts_share(model: LanguageModel) -> float | None:
    """The part of a forward's FLOPs that routed experts have, with causal attention over the longest sequence.

    None where a layer does not say what its experts are.
    """
    costs = model.costs()
    total = 2.0 * costs.active + costs.attention_flops + costs.other_flops
    routed = 0.0
    dim = model.embedding.weight.shape[1]
    for path, layer in model.expert_layers().items():
        if not path.startswith("blocks."):
            continue  # multi-token modules do not run in prefill
        networks = layer.networks()
        if networks is None:
            return None
        routed += 2.0 * 3 * dim * networks.expert_hidden * networks.top_k
    return routed / total


def _reported(
    folder: Path, loads: RecordedLoads, options: PlacementOptions, share: float | None
) -> PlacementReport:
    """Plans, and makes the document."""
    groups = options.groups or loads.groups
    plan_of = _planner(options, groups)
    parts = loads.stretches(options.stretches)
    first, last = parts[-1] if loads.changes else (0, len(loads.at))
    measured = loads.between(first, last)
    plan = plan_of(measured)
    before = all_in_order(measured, options.gpus)
    after = by_plan(plan, measured)
    placed = _without_replicas(measured, options, groups)
    lags = by_lag(loads, options.stretches, plan_of)
    notices = list(loads.notices)
    if len(parts) == 1:
        notices.append(
            "there is one entry of loads only, so nothing says how long the plan stays good"
        )
    document = {
        "schema": SCHEMA,
        "source": {
            "name": loads.name,
            "unit": loads.unit,
            "entries": len(loads.at),
            "planned_from": [loads.at[first], loads.at[last - 1]],
            "groups": groups,
        },
        **plan.to_dict(),
        "experts": [placement.experts for placement in plan.layers.values()],
        "load": {
            "before": list(before.values()),
            "without_replicas": None if placed is None else list(placed.values()),
            "after": list(after.values()),
        },
        "balancedness": {
            "before": [balancedness(load_G) for load_G in before.values()],
            "without_replicas": (
                None if placed is None else [balancedness(load_G) for load_G in placed.values()]
            ),
            "after": [balancedness(load_G) for load_G in after.values()],
        },
        "prefill": _prefill(before, placed, after, share),
        "lags": _lags(lags, loads, parts),
        "notices": notices,
    }
    return PlacementReport(folder, plan, document)


def _without_replicas(
    measured: LoadByLayer, options: PlacementOptions, groups: int
) -> dict[str, list[float]] | None:
    """The load of each GPU if experts are placed and none has a replica; None if they cannot be divided evenly."""
    for load_E in measured.values():
        if len(load_E) % options.gpus:
            return None
    found = {}
    for path, load_E in measured.items():
        alone = _planner(replace(options, replicas=len(load_E)), groups)({path: load_E})
        found.update(by_plan(alone, {path: load_E}))
    return found


def _prefill(
    before: dict[str, list[float]],
    placed: dict[str, list[float]] | None,
    after: dict[str, list[float]],
    share: float | None,
) -> dict[str, Any]:
    """What the model of time predicts; multi-token modules do not run in prefill."""

    def main(gpus: dict[str, list[float]]) -> float:
        chosen = {path: load_G for path, load_G in gpus.items() if not path.startswith("heads.")}
        return over_layers(chosen or gpus)

    found: dict[str, Any] = {"model": TIME_MODEL, "experts_share": share}
    balance = {"before": main(before), "after": main(after)}
    if placed is not None:
        balance["without_replicas"] = main(placed)
    found["balancedness"] = balance
    for name in ("without_replicas", "after"):
        gains = None
        if name in balance:
            gains = {
                "experts": step_gain(balance["before"], balance[name], 1.0),
                "step": None,
            }
            if share is not None:
                gains["step"] = step_gain(balance["before"], balance[name], share)
        found["gain" if name == "after" else "gain_without_replicas"] = gains
    return found


def _lags(
    lags: Sequence[AtLag], loads: RecordedLoads, parts: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """How balancedness falls with the distance between planning and measuring."""
    span = (loads.at[-1] - loads.at[0] + 1) / len(parts)
    last = good_for(lags)
    rows = []
    for one in lags:
        rows.append(
            {
                "lag": one.lag,
                "pairs": one.pairs,
                "balancedness": one.balancedness,
                "lowest": one.lowest,
                "in_order": one.in_order,
            }
        )
    return {
        "stretches": len(parts),
        "span": span,
        "unit": loads.unit,
        "by_lag": rows,
        "good_for": last,
        "good_for_units": None if last is None else last * span,
    }
