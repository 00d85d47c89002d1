"""The model of a run, from the recipe and the weights that are in its folder."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from core.assemble import build
from core.contracts.errors import UserError
from core.interop.run_weights import is_converted, own_kinds, state_of, weights_of
from core.interop.tensors import Tensors, chunks
from core.model.language_model import LanguageModel
from core.recipe.compose import compose
from core.training.folder import RunFolder
from core.training.resume import newest_checkpoint


def load(run_or_checkpoint: str | Path) -> LanguageModel:
    """A trained model in evaluation mode, from a run folder (its newest checkpoint) or one checkpoint file.

    Raises:
        UserError: no run there, or a damaged checkpoint.
    """
    checkpoint = newest_checkpoint(Path(run_or_checkpoint))
    model = build(compose(run_of(checkpoint).recipe))
    load_weights(model, checkpoint)
    return model.eval()


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's weights into a model, in the model's own formats; every tensor must find its place.

    The tensors of a converted run are read a few rows at a time.

    Args:
        model: its weights are replaced.
        checkpoint: a checkpoint file, or the index of a converted run's weights.

    Raises:
        UserError: the first missing, unexpected or differently shaped tensor, by name.
    """
    if is_converted(checkpoint):
        weights = weights_of(checkpoint)
        _check_places(model, {name: kind.shape for name, kind in own_kinds(weights).items()}, checkpoint)
        _copy_rows(model, weights)
    else:
        state = state_of(checkpoint)
        _check_places(model, {name: tuple(tensor.shape) for name, tensor in state.items()}, checkpoint)
        model.load_state_dict(state)


def _check_places(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], checkpoint: Path) -> None:
    """Raises `UserError` unless the tensors of a checkpoint are those of the model, by name and shape."""
    own = model.state_dict()
    for name in [*own, *shapes]:
        if name not in shapes or name not in own:
            what = "missing" if name not in shapes else "not of this model"
            raise UserError(f"{checkpoint}: tensor {name} is {what}")
        theirs, ours = shapes[name], tuple(own[name].shape)
        if theirs != ours:
            raise UserError(f"{checkpoint}: tensor {name} is {theirs}, the model's {ours}")


@torch.no_grad()
def _copy_rows(model: nn.Module, weights: Tensors) -> None:
    """Copies every tensor of a model from weights that are read in chunks."""
    for name, tensor in model.state_dict().items():
        kind = weights.kinds[name]
        rows = tensor.view(kind.rows, kind.width)
        for low, high in chunks(kind, 0, kind.rows):
            rows[low:high] = weights.values(name, low, high, tensor.dtype)


def run_of(path: Path) -> RunFolder:
    """The run that a folder is, or that a checkpoint belongs to.

    Raises:
        UserError: there is no recipe.
    """
    folder = RunFolder(path if path.is_dir() else path.parent.parent)
    if not folder.recipe.exists():
        raise UserError(f"{path}: no run here (no {folder.recipe})")
    return folder
