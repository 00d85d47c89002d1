"""Predicts a step of a recipe on a cluster: its time by parts, the memory of every rank, tokens per day."""

from dataclasses import asdict, dataclass, replace
from math import gcd
from typing import Any

from core.analysis.exchange import check_choice
from core.analysis.memory import StateBytes
from core.analysis.parallel_layout import ParallelLayout
from core.cluster.assumptions import assumptions
from core.cluster.cluster_file import Cluster
from core.cluster.cost import CostModel, StageSeconds
from core.cluster.plan import ActionKind, Plan, Slot
from core.cluster.simulate import Timeline, simulate
from core.cluster.subject import Subject
from core.cluster.sync import SyncSeconds, sync_seconds, weights_of
from core.cluster.work import Work
from core.contracts.errors import UserError

DAY = 86_400

MOST_ACTIONS = 300_000
"""The largest number of forwards that a plan is simulated with."""


@dataclass(frozen=True)
class Prediction:
    """What was found.

    Args:
        document: what `--json` prints.
        timeline: the plan with its times.
    """

    document: dict[str, Any]
    timeline: Timeline


def predict(subject: Subject, cluster: Cluster) -> Prediction:
    """The prediction of one layout.

    Raises:
        UserError: the layout does not fit the model, its batch or its schedule.
    """
    _check(subject, cluster)
    cluster = with_micro_batches(subject, cluster)
    layout, strategy = cluster.layout, cluster.layout.strategy
    plan = plan_of_layout(subject, cluster)
    works = subject.works(len(plan.routes[0]))
    assert layout.micro_batches is not None
    length = subject.recipe.data.sequence_length
    model = CostModel(cluster, subject.choices, length)
    seconds = stage_seconds(model, works)
    timeline = simulate(plan, durations(plan, model, seconds), _transfer(cluster, model, works))
    memory, held = _memory(subject, cluster, plan)
    ranks = [
        _rank(cluster, plan, rank, works, held[rank], subject) for rank in range(strategy.ranks)
    ]
    parts = _parts(cluster, timeline, seconds, plan, ranks)
    step = sum(parts.values())
    data = strategy.inner.ranks
    tokens = layout.micro_batches * layout.micro_batch * length * data
    rate = tokens / step
    flops = rate * subject.flops / cluster.gpus
    document = {
        "recipe": subject.recipe.source,
        "cluster": cluster.source,
        "gpus": cluster.gpus,
        "layout": asdict(layout),
        "micro_batches": layout.micro_batches,
        "tokens_per_step": tokens,
        "step_seconds": step,
        "parts": parts,
        "bubble_share": parts["bubble"] / step,
        "tokens_per_second_per_gpu": rate / cluster.gpus,
        "tokens_per_day": rate * DAY,
        "tflops_per_gpu": flops / 1e12,
        "mfu": flops / cluster.device.bf16,
        "stages": [
            _stage(index, work, secs)
            for index, (work, secs) in enumerate(zip(works, seconds, strict=True))
        ],
        "memory": memory,
        "device_memory": cluster.device.memory,
        "largest_bytes": max(row["total"] for row in memory),
        "efficiencies": asdict(cluster.efficiencies),
        "assumptions": assumptions(cluster),
    }
    return Prediction(document, timeline)


def stage_seconds(model: CostModel, works: list[Work]) -> list[StageSeconds]:
    """The seconds of every stage; those in the middle of a pipeline are mostly alike."""
    found: list[StageSeconds] = []
    for index, work in enumerate(works):
        alike = next((i for i in range(index) if works[i].alike(work)), None)
        found.append(model.stage(work) if alike is None else found[alike])
    return found


def least_seconds(subject: Subject, cluster: Cluster, plan: Plan) -> float:
    """A step cannot take less than what one rank computes; found without a simulation."""
    works = subject.works(len(plan.routes[0]))
    model = CostModel(cluster, subject.choices, subject.recipe.data.sequence_length)
    seconds = stage_seconds(model, works)
    most = 0.0
    for rank in range(len(plan.ranks)):
        own = 0.0
        for route, position in plan.chunks(rank):
            both = seconds[position].forward + seconds[position].backward
            one = both.compute if cluster.layout.overlap else both.alone
            own += plan.micro_batches[route] * one
        most = max(most, own)
    return most


def with_micro_batches(subject: Subject, cluster: Cluster) -> Cluster:
    """The cluster with the micro-batches of a step filled in from the recipe's batch.

    Raises:
        UserError: the recipe's batch cannot be shared out.
    """
    layout = cluster.layout
    if layout.micro_batches is not None:
        return cluster
    steps = subject.steps
    sequences = steps.window(steps.steps - 1).count * steps.sequences
    share = layout.strategy.inner.ranks * layout.micro_batch
    if sequences % share:
        raise UserError(
            f"{cluster.source}: layout.micro_batch = {layout.micro_batch} on {layout.strategy.inner.ranks} ranks must "
            f"divide the {sequences} sequences of a step; or give layout.micro_batches"
        )
    return replace(cluster, layout=replace(layout, micro_batches=sequences // share))


def plan_of_layout(subject: Subject, cluster: Cluster) -> Plan:
    """The plan of a layout whose micro-batches are known.

    Raises:
        UserError: the layout does not fit the model or its schedule.
    """
    _check(subject, cluster)
    strategy = cluster.layout.strategy
    micro_batches = cluster.layout.micro_batches
    assert micro_batches is not None
    if strategy.ranks * strategy.chunks * micro_batches > MOST_ACTIONS:
        raise UserError(
            f"{cluster.source}: layout.micro_batches = {micro_batches} on {strategy.ranks * strategy.chunks} stages "
            f"must make at most {MOST_ACTIONS:,} forwards"
        )
    if strategy.ranks == 1:
        return subject.plan("1f1b", 1, micro_batches, 1)
    try:
        return subject.plan(strategy.schedule, strategy.ranks, micro_batches, strategy.chunks)
    except UserError as error:
        raise UserError(f"{cluster.source}: layout.strategy: {error}") from error


def _check(subject: Subject, cluster: Cluster) -> None:
    """Raises `UserError` for a layout that does not fit the model."""
    strategy = cluster.layout.strategy
    at = f"{cluster.source}: layout.strategy"
    ranks = strategy.inner.expert_ranks
    if ranks > 1 and not subject.choices:
        raise UserError(
            f"{at}.inner.expert_ranks = {ranks} must be 1: the model has no routed experts"
        )
    for path, choice in subject.choices.items():
        try:
            check_choice(path, choice, ranks, gcd(ranks, cluster.links.gpus_per_node))
        except UserError as error:
            raise UserError(f"{at}.inner: {error}") from error
    layers = subject.layers
    stages = strategy.ranks * strategy.chunks * (2 if strategy.schedule == "dualpipev" else 1)
    if strategy.ranks > 1 and stages > layers:
        raise UserError(f"{at}: {stages} stages must be at most {layers}, the layers of the model")


def durations(plan: Plan, model: CostModel, seconds: list[StageSeconds]) -> Any:
    """Seconds of every slot of a plan."""

    def duration(rank: int, slot: Slot) -> float:
        first = seconds[slot[0].position]
        if len(slot) == 2:
            return model.pair(first, seconds[slot[1].position])
        kind = slot[0].kind
        if kind is ActionKind.FORWARD:
            return first.forward.alone
        if kind is ActionKind.BACKWARD:
            return first.backward.alone
        return first.inputs.alone if kind is ActionKind.INPUT else first.weights.alone

    return duration


def _transfer(cluster: Cluster, model: CostModel, works: list[Work]) -> float:
    """Seconds until a micro-batch's states have reached the next stage."""
    links, known = cluster.links, cluster.efficiencies
    if cluster.layout.strategy.ranks == 1:
        return 0.0
    speed = links.between * known.between
    if cluster.gpus <= links.gpus_per_node:
        speed = links.inside * known.inside
    return works[0].dim * 2 * model.tokens / speed


def _memory(
    subject: Subject, cluster: Cluster, plan: Plan
) -> tuple[list[dict[str, Any]], list[StateBytes]]:
    """The memory of a GPU of every rank, and the states that it holds."""
    layout, strategy = cluster.layout, cluster.layout.strategy
    stages = len(plan.routes[0])
    inner = strategy.inner
    axes = ParallelLayout(inner.ranks, inner.expert_ranks, stages)
    copies = len(plan.routes)
    counted = subject.stages(axes, copies)
    tokens = layout.micro_batch * subject.recipe.data.sequence_length / strategy.tensor
    rows = []
    held = []
    for rank in range(strategy.ranks):
        chunks = [position for _, position in plan.chunks(rank)]
        states = sum((counted[p].states for p in chunks), start=StateBytes())
        kept = 0.0
        for position, count in zip(chunks, plan.peak_by_chunk(rank), strict=True):
            kept += counted[position].activations.kept(layout.recompute) * count
        again = max(counted[p].activations.recomputed(layout.recompute) for p in chunks)
        sizes = _states(states, cluster, subject.moment_bytes)
        activations = round(tokens * (kept + again))
        rows.append(
            {
                "rank": rank,
                "blocks": [name for p in chunks for name in counted[p].blocks],
                "in_flight": plan.peak_in_flight(rank),
                **sizes,
                "activations": activations,
                "total": sum(sizes.values()) + activations,
            }
        )
        held.append(states)
    return rows, held


def fullest_bytes(subject: Subject, cluster: Cluster, plan: Plan) -> int:
    """The memory of the fullest GPU under a layout."""
    rows, _ = _memory(subject, cluster, plan)
    largest: int = max(row["total"] for row in rows)
    return largest


def _states(states: StateBytes, cluster: Cluster, moment_bytes: float) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer states under the inner strategy."""
    inner = cluster.layout.strategy.inner
    if inner.name == "zero1":
        return {
            "weights": states.weights,
            "gradients": states.gradients,
            "optimizer": states.optimizer,
        }
    owners = inner.ranks // inner.expert_ranks if inner.name in ("fsdp", "expert_parallel") else 1
    own = states.parameters / owners
    return {
        "weights": round(4 * own),
        "gradients": round(4 * own),
        "optimizer": round(moment_bytes * own),
    }


def _rank(
    cluster: Cluster, plan: Plan, rank: int, works: list[Work], held: StateBytes, subject: Subject
) -> SyncSeconds:
    """The seconds of a rank outside of its micro-batches."""
    own = [works[position] for _, position in plan.chunks(rank)]
    weights = weights_of(own, held.parameters, cluster.layout.strategy.inner.expert_ranks)
    return sync_seconds(cluster, weights, subject.moment_bytes, len(plan.routes))


def _parts(
    cluster: Cluster,
    timeline: Timeline,
    seconds: list[StageSeconds],
    plan: Plan,
    ranks: list[SyncSeconds],
) -> dict[str, float]:
    """The step's seconds by part, as means over the ranks of the pipeline; they add up to the step."""
    names = {
        "F": "forward",
        "B": "backward",
        "I": "backward_inputs",
        "W": "backward_weights",
        "FB": "overlapped_forward_backward",
    }
    count = len(plan.ranks)
    parts = dict.fromkeys(names.values(), 0.0)
    for rank in range(count):
        for kind, spent in timeline.spent(rank).items():
            parts[names[kind]] += spent / count
    parts["bubble"] = max(0.0, timeline.seconds - sum(parts.values()))
    gradients = max(one.gradients for one in ranks)
    gathers = max(one.gathers for one in ranks)
    if cluster.layout.overlap:
        # sums run beside the backward of the last micro-batch, gathers in a step's forwards and backwards
        gradients = max(0.0, gradients - max(s.backward.compute for s in seconds))
        if cluster.layout.strategy.inner.name != "zero1":
            gathers = max(0.0, gathers - timeline.seconds)
    parts["gradients"] = gradients
    parts["gathers"] = gathers
    parts["optimizer"] = max(one.optimizer for one in ranks)
    return parts


def _stage(index: int, work: Work, seconds: StageSeconds) -> dict[str, Any]:
    """The seconds of a stage for one micro-batch, by part."""
    return {
        "stage": index,
        "forward": asdict(seconds.forward),
        "backward_inputs": asdict(seconds.inputs),
        "backward_weights": asdict(seconds.weights),
    }
