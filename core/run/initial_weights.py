"""The weights that a run takes from another one: which are taken, made, drawn and left out, and their loading."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.assemble import build
from core.contracts.errors import ConfigError, NotFiniteError, UserError
from core.contracts.name_patterns import check_chosen, chosen_by, listed
from core.interop.finite import FiniteTensors
from core.interop.run_weights import shapes_of, weights_of
from core.model.growth import longer
from core.model.language_model import LanguageModel
from core.numerics.finite import not_finite_in
from core.numerics.part_exchange import local_tensor
from core.recipe.compose import compose_run
from core.recipe.selection import Selection
from core.run.grown_layers import Grown, Tensors, grown_layers, wide
from core.run.loading import NOT_FINITE, WholeTensors, added_to, load_weights, run_of
from core.training.weight_shards import WeightShard

KEY = "initial_weights"

VOCABULARY = ("embedding.weight", "output.weight")
"""The model's tensors with a row for each token."""


@dataclass
class InitialWeights:
    """The weights that a run starts from.

    Args:
        source: the checkpoint.
        taken: how many tensors are taken as they are.
        grown: tensors that are made from those of the source, by name.
        drawn: tensors of the model that are drawn.
        left_out: tensors of the source that the model does not get.
        sentences: what the user reads about it.
    """

    source: Path
    taken: int = 0
    grown: dict[str, Grown] = field(default_factory=dict)
    drawn: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)

    @property
    def passed_over(self) -> set[str]:
        """Names of all tensors that are not taken as they are, here or there."""
        used = (name for made in self.grown.values() for name in made.uses)
        return {*self.grown, *self.drawn, *self.left_out, *used}

    def record(self) -> dict[str, Any]:
        """What a run's provenance says about it."""
        return {
            "checkpoint": str(self.source.resolve()),
            "taken": self.taken,
            "made": sorted(self.grown),
            "drawn": sorted(self.drawn),
            "left_out": sorted(self.left_out),
            "notices": list(self.sentences),
        }

    def load(self, model: LanguageModel, parts: Mapping[str, WeightShard] | None = None) -> None:
        """Replaces the drawn weights of a model.

        Args:
            model: the model, whose weights are drawn.
            parts: the weights of a model that is divided over ranks, which all call this; None: it is whole.

        Raises:
            UserError: the checkpoint is damaged.
            NotFiniteError: it holds a number that is not finite.
        """
        load_weights(model, self.source, parts, added=self.passed_over)
        if not self.grown:
            return
        reader = FiniteTensors(weights_of(self.source), str(self.source), NOT_FINITE)
        tensors = WholeTensors(reader)
        state = model.state_dict()
        with torch.no_grad():
            for name in state:
                if name in self.grown:
                    shard = None if parts is None else parts.get(name)
                    self._fill(name, state[name], tensors, shard)

    def _fill(self, name: str, tensor: Tensor, tensors: Tensors, shard: WeightShard | None) -> None:
        """Copies a made tensor, or this rank's part of it, to where the model has it."""
        own = local_tensor(tensor)

        def drawn() -> Tensor:
            whole = own if shard is None or not shard.is_sharded else shard.gather(own)
            return wide(whole).clone()

        made = self.grown[name].make(tensors, drawn)
        if shard is not None:
            made = shard.shard_of(made)
        own.copy_(made)
        found = not_finite_in({name: own})
        if found:
            raise NotFiniteError(f"{self.source}: {found} after {KEY} has made it")


def initial_weights(
    model: LanguageModel, source: Path, selection: Selection, *, trust: bool
) -> InitialWeights:
    """Plans what a model takes from a checkpoint; no number is read, and nothing is left to chance.

    Args:
        model: the whole model, which may be on the meta device.
        source: the checkpoint.
        selection: what is taken.
        trust: whether the recipe of a run that was made elsewhere may name modules.

    Raises:
        UserError: a tensor that nobody asked to draw, to make or to leave out, by name, or a pattern without a tensor.
    """
    ours = {name: tuple(t.shape) for name, t in model.state_dict().items() if torch.is_tensor(t)}
    theirs = shapes_of(source)
    names = [*ours, *(name for name in theirs if name not in ours)]
    for key, patterns in (("include", selection.include), ("exclude", selection.exclude)):
        try:
            check_chosen(patterns, names, f"{KEY}.{key}")
        except ConfigError as error:
            raise UserError(f"{error.key}: {error.why} ({source})") from error
    wanted = chosen_by(selection.include, names) - chosen_by(selection.exclude, names)
    added = added_to(model, source)
    found = InitialWeights(source)
    grown, drawn = _grown(model, source, selection, ours, theirs, found.sentences, trust=trust)
    found.grown = {name: made for name, made in grown.items() if name in wanted}
    used = {name for made in found.grown.values() for name in made.uses}
    for name, shape in ours.items():
        if name in found.grown:
            continue
        if name not in wanted or name in added or name in drawn:
            found.drawn.append(name)
            continue
        _check(name, shape, theirs, source)
        found.taken += 1
    for name in theirs:
        if name not in ours and name not in used:
            if name in wanted and name not in added:
                how = f"{KEY}.exclude: [{name}] leaves it out"
                raise UserError(f"{source}: tensor {name} is not of this model; {how}")
            found.left_out.append(name)
        elif name in ours and name in found.drawn and name not in used:
            found.left_out.append(name)
    if not found.taken and not found.grown:
        raise UserError(f"{KEY}: takes no tensor from {source}")
    found.sentences += _sentences(found)
    return found


def _check(
    name: str, shape: tuple[int, ...], theirs: Mapping[str, tuple[int, ...]], source: Path
) -> None:
    """Raises `UserError` unless the source has the tensor in the same shape."""
    if name not in theirs:
        raise UserError(
            f"{source}: tensor {name} is missing; {KEY}.exclude: [{name}] leaves it as it is drawn"
        )
    if theirs[name] == shape:
        return
    how = f"{KEY}.exclude: [{name}] leaves it as it is drawn"
    if name in VOCABULARY and theirs[name][1:] == shape[1:] and theirs[name][0] < shape[0]:
        how = f"{KEY}.vocabulary: mean, or draw, makes the new rows"
    elif ".routed." in name or (theirs[name][1:] == shape[1:] and theirs[name][0] < shape[0]):
        how = f"{KEY}.experts: copy, or split, makes experts; {how}"
    raise UserError(f"{source}: tensor {name} is {theirs[name]}, the model's {shape}; {how}")


def _grown(
    model: LanguageModel,
    source: Path,
    selection: Selection,
    ours: Mapping[str, tuple[int, ...]],
    theirs: Mapping[str, tuple[int, ...]],
    sentences: list[str],
    *,
    trust: bool,
) -> tuple[dict[str, Grown], set[str]]:
    """The tensors that are made, and those that are drawn beside them; appends what is made of what."""
    grown: dict[str, Grown] = {}
    drawn: set[str] = set()
    if selection.experts is not None:
        other = build(compose_run(run_of(source).recipe, trust=trust), device="meta")
        layers = grown_layers(model, other, selection, f"{KEY}: {source}")
        for layer in layers.values():
            grown |= layer.tensors
            drawn.update(layer.drawn)
        by_sentence: dict[str, list[str]] = {}
        for path, layer in layers.items():
            exact = "" if layer.is_exact else ", and the layer's output is not the source's"
            by_sentence.setdefault(f"{layer.sentence}{exact}", []).append(path)
        for sentence, paths in by_sentence.items():
            sentences.append(f"{KEY}: {listed(paths)}: {sentence}")
    if selection.vocabulary is not None:
        grown |= _vocabulary(source, selection, ours, theirs, sentences)
    return grown, drawn


def _vocabulary(
    source: Path,
    selection: Selection,
    ours: Mapping[str, tuple[int, ...]],
    theirs: Mapping[str, tuple[int, ...]],
    sentences: list[str],
) -> dict[str, Grown]:
    """The tensors with a row for each token, whose first rows are the source's."""
    found: dict[str, Grown] = {}
    mean = selection.vocabulary == "mean"
    for name in VOCABULARY:
        if name not in ours or name not in theirs or ours[name] == theirs[name]:
            continue
        if ours[name][1:] != theirs[name][1:] or ours[name][0] < theirs[name][0]:
            why = f"tensor {name} is {theirs[name]}, the model's {ours[name]}"
            raise UserError(f"{KEY}.vocabulary: {source}: {why}: rows can only be added")
        found[name] = Grown(_longer(name, mean=mean), True, (name,))
        made = "the mean of the old ones" if mean else "drawn"
        added = ours[name][0] - theirs[name][0]
        sentences.append(f"{KEY}: {name}: {added} new rows after {theirs[name][0]}, {made}")
    if not found:
        why = f"the model has as many tokens as {source}"
        raise UserError(f"{KEY}.vocabulary = {selection.vocabulary}: {why}")
    return found


def _longer(name: str, *, mean: bool) -> Callable[[Tensors, Callable[[], Tensor]], Tensor]:
    def make(tensors: Tensors, drawn: Callable[[], Tensor]) -> Tensor:
        return longer(tensors[name], drawn(), mean=mean)

    return make


def _sentences(found: InitialWeights) -> list[str]:
    """What is drawn and what is left out; nothing where every tensor is taken."""
    lines = []
    for names, what in (
        (found.drawn, "tensors of the model are drawn"),
        (found.left_out, f"tensors of {found.source} are left out"),
    ):
        if names:
            lines.append(f"{KEY}: {len(names)} {what}: {listed(names)}")
    return lines
