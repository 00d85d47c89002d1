"""The model of a run, built from the recipe and the weights in its folder."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.assemble import build
from core.checkpoints.listing import is_checkpoint
from core.checkpoints.reading import open_shards
from core.checkpoints.shards import MODEL
from core.checkpoints.tensor_shard import TensorShard
from core.contracts.errors import NotFiniteError, UserError
from core.extension.loader import default_section
from core.generation.run_tokenizer import RunTokenizer
from core.interop.finite import FiniteTensors
from core.interop.run_weights import model_specs, reads_rows, shapes_of, state_of, weights_of
from core.interop.shard_rows import PREFIX
from core.interop.tensors import TensorReader, TensorSpec, chunks
from core.model.language_model import LanguageModel
from core.numerics.finite import not_finite_in
from core.numerics.part_exchange import local_tensor
from core.recipe.compose import compose_run
from core.training.local_parameters import local_state
from core.training.ranks import first_text_over_ranks
from core.training.resume import newest_checkpoint
from core.training.run_folder import RunFolder
from core.training.weight_shards import WeightShard, check_over_ranks, load_full_state

NOT_FINITE = "such weights predict nothing: name another checkpoint"
"""The end of the error message for weights that are not finite."""


def load(
    run_or_checkpoint: str | Path,
    *,
    trust: bool = False,
    weights: str | None = None,
    dispatcher: str | None = None,
) -> LanguageModel:
    """Loads a trained model in evaluation mode, from a run folder (its newest checkpoint) or one checkpoint.

    Args:
        run_or_checkpoint: the run folder, or the checkpoint.
        trust: whether the recipe of a run that was made elsewhere may name modules, which then run.
        weights: the name of averaged weights, such as "ema"; None: those that were trained.
        dispatcher: the name of a dispatcher in the place of those of the recipe, which `core.place` needs to divide
            experts over ranks; None: those of the recipe.

    Raises:
        UserError: no run there, a damaged checkpoint, no such average or dispatcher, or a recipe that names a module
            which may not run.
        NotFiniteError: a weight that is not finite.
    """
    checkpoint = newest_checkpoint(Path(run_or_checkpoint))
    recipe = compose_run(run_of(checkpoint).recipe, trust=trust)
    recipe.freeze = []  # it was for that run's training
    section = None if dispatcher is None else default_section("dispatcher", dispatcher)
    model = build(recipe, dispatcher=section)
    load_weights(model, checkpoint, average=weights)
    return model.eval()


def load_tokenizer(run_or_checkpoint: str | Path) -> RunTokenizer:
    """Loads the tokenizer of a trained model, with the tokens that begin and end a text.

    Args:
        run_or_checkpoint: the run folder, or one checkpoint.

    Raises:
        UserError: no run there, or no tokenizer in it.
    """
    return RunTokenizer.of(run_of(Path(run_or_checkpoint)))


def added_to(model: LanguageModel, checkpoint: Path) -> set[str]:
    """The names of tensors that layers add to those of a checkpoint (`added_state`), or had there and no longer have.

    Raises:
        UserError: the checkpoint has some of what a layer adds.
    """
    adding = []
    for block, part, layer in model.block_layers():
        names = [f"{block}.{part}.{name}" for name in layer.added_state()]
        if names:
            adding.append(names)
    if not adding:
        return set()
    shapes = shapes_of(checkpoint)
    own = model.state_dict()
    found: set[str] = set()
    for names in adding:
        weights = [name for name in names if name in own and own[name].ndim]
        lacking = [name for name in weights if name not in shapes]
        if lacking and len(lacking) < len(weights):
            raise UserError(f"{checkpoint}: tensor {lacking[0]} is missing")
        found.update(name for name in names if (name in own) != (name in shapes))
    return found


def check_weights(model: nn.Module, checkpoint: Path, added: Collection[str] = frozenset()) -> None:
    """Checks that the tensors of a checkpoint are those of a model, by name and shape; their values are not read.

    Args:
        model: a whole model, on any device.
        checkpoint: a checkpoint, or the index of a converted run's weights.
        added: names of tensors that only one of the two has.

    Raises:
        UserError: the first missing, unexpected or differently shaped tensor, by name.
    """
    _check_shapes(model, shapes_of(checkpoint), checkpoint, added)


def load_weights(
    model: nn.Module,
    checkpoint: Path,
    parts: Mapping[str, WeightShard] | None = None,
    *,
    average: str | None = None,
    added: Collection[str] = frozenset(),
) -> None:
    """Loads a checkpoint's weights into a model, in the model's own formats.

    The tensors of a converted run or of a sharded checkpoint are read a few rows at a time, unless they are divided.

    Args:
        model: the model whose weights are replaced.
        checkpoint: a checkpoint, or the index of a converted run's weights.
        parts: the weights of a model that is divided over ranks, which each take their own parts; None: it is whole.
            `check_weights` has checked the checkpoint.
        average: the name of averaged weights to load, into a model that is whole; None: those that were trained.
        added: names of tensors that only one of the two has, from `added_to`; the model's keep their values.

    Raises:
        UserError: the first missing, unexpected or differently shaped tensor, by name.
        NotFiniteError: the first tensor that holds a number which is not finite, or is too large for the model's
            format; the model may then hold some of the weights.
    """
    if parts is not None:
        _load_parts(model, checkpoint, parts, added)
    elif reads_rows(checkpoint):
        weights = weights_of(checkpoint, average)
        shapes = {name: spec.shape for name, spec in model_specs(weights).items()}
        _check_shapes(model, shapes, checkpoint, added)
        _copy_rows(model, FiniteTensors(weights, str(checkpoint), NOT_FINITE), added)
    else:
        state = state_of(checkpoint, average)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        _check_shapes(model, shapes, checkpoint, added)
        own = model.state_dict()
        state = {name: own[name] if name in added else state[name] for name in own}
        found = not_finite_in(state)
        if found:
            raise NotFiniteError(f"{checkpoint}: {found}; {NOT_FINITE}")
        model.load_state_dict(state)
        found = not_finite_in(model.state_dict())
        if found:
            raise NotFiniteError(f"{checkpoint}: {found} in the format of this recipe's precision")


def _load_parts(
    model: nn.Module,
    checkpoint: Path,
    parts: Mapping[str, WeightShard],
    added: Collection[str],
) -> None:
    """Copies this rank's parts of the weights of a checkpoint into a divided model.

    Raises:
        NotFiniteError: the first tensor that holds a number which is not finite.
    """
    if checkpoint.is_dir():
        _load_sharded(model, checkpoint, parts, added)
        return
    whole: Mapping[str, Any]
    if reads_rows(checkpoint):
        whole = WholeTensors(FiniteTensors(weights_of(checkpoint), str(checkpoint), NOT_FINITE))
    else:
        whole = state_of(checkpoint)
        found = not_finite_in(whole)
        if found:
            raise NotFiniteError(f"{checkpoint}: {found}; {NOT_FINITE}")
    load_full_state(model, whole, parts, added)
    found = first_text_over_ranks(not_finite_in(local_state(model)))
    if found:
        raise NotFiniteError(f"{checkpoint}: {found} in the format of this recipe's precision")


def _load_sharded(
    model: nn.Module,
    checkpoint: Path,
    parts: Mapping[str, WeightShard],
    added: Collection[str],
) -> None:
    """Copies this rank's parts of the weights of a sharded checkpoint into a divided model, and reads no others."""
    reader = open_shards(checkpoint)
    check_over_ranks(reader, MODEL)
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor) or name in added:
            continue
        own = local_tensor(value)
        part = parts[name].place(own) if name in parts else TensorShard.whole(own)
        own.copy_(reader.read_slice(f"{PREFIX}{name}", part.offsets, own.shape))
    found = first_text_over_ranks(not_finite_in(local_state(model)))
    if found:
        raise NotFiniteError(f"{checkpoint}: {found}; {NOT_FINITE}")


def _is_plain(spec: TensorSpec) -> bool:
    """Whether numbers are kept as they are, and not as codes of 8 bits with scales."""
    return spec.dtype.itemsize > 1


class WholeTensors(Mapping[str, torch.Tensor]):
    """The tensors of a reader, each read as a whole, in fp32 or wider, when it is asked for."""

    def __init__(self, reader: TensorReader) -> None:
        self.reader = reader

    def __getitem__(self, name: str) -> torch.Tensor:
        spec = self.reader.specs[name]
        dtype = torch.promote_types(spec.dtype, torch.float32) if _is_plain(spec) else torch.float32
        rows = self.reader.values(name, 0, spec.rows, dtype)
        return rows.view(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.reader.specs)

    def __len__(self) -> int:
        return len(self.reader.specs)


def _check_shapes(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    checkpoint: Path,
    added: Collection[str],
) -> None:
    """Raises `UserError` unless the tensors of a checkpoint are those of the model, by name and shape."""
    own = model.state_dict()
    for name in [*own, *shapes]:
        if name in added:
            continue
        if name not in shapes:
            raise UserError(f"{checkpoint}: tensor {name} is missing")
        if name not in own:
            raise UserError(f"{checkpoint}: tensor {name} is not of this model")
        theirs = shapes[name]
        ours = tuple(own[name].shape)
        if theirs != ours:
            raise UserError(f"{checkpoint}: tensor {name} is {theirs}, the model's {ours}")


@torch.no_grad()
def _copy_rows(model: nn.Module, weights: TensorReader, added: Collection[str]) -> None:
    """Copies the tensors of a model, but those that it adds, from weights that are read a few rows at a time."""
    for name, tensor in model.state_dict().items():
        if name in added:
            continue
        spec = weights.specs[name]
        rows = tensor.view(spec.rows, spec.width)
        for low, high in chunks(spec, 0, spec.rows):
            rows[low:high] = weights.values(name, low, high, tensor.dtype)


def run_of(path: Path) -> RunFolder:
    """The run folder at a path, or the one that a checkpoint belongs to.

    Raises:
        UserError: there is no recipe.
    """
    place = path.parent.parent if is_checkpoint(path) else path
    folder = RunFolder(place)
    if not folder.recipe.exists():
        raise UserError(f"{path}: no run here (no {folder.recipe})")
    return folder
