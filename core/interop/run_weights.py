"""The weights of a run, wherever they are: a checkpoint of our training, or the files of a converted run."""

from pathlib import Path

import torch
from torch import nn

from core.contracts.errors import UserError
from core.interop.shards import INDEX, shards_of
from core.interop.tensors import SCALE, Kind, Loaded, Tensors, chunks
from core.training.checkpoints import read_checkpoint


def weights_of(checkpoint: Path) -> Tensors:
    """The model's tensors of a checkpoint file or of a converted run's index.

    Raises:
        UserError: it is damaged or not ours.
    """
    if checkpoint.name == INDEX:
        return shards_of(checkpoint.parent)
    state = read_checkpoint(checkpoint)["state_dict"]
    tensors = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.") and torch.is_tensor(t)}
    return Loaded({name: t for name, t in tensors.items() if not name.endswith("_extra_state")})


def own_kinds(weights: Tensors) -> dict[str, Kind]:
    """The tensors without the scales of FP8 codes."""
    kinds = weights.kinds
    return {n: kind for n, kind in kinds.items() if not (n.endswith(SCALE) and n.removesuffix(SCALE) in kinds)}


@torch.no_grad()
def load_into(model: nn.Module, weights: Tensors, where: Path) -> None:
    """Put weights into a model, a few rows at a time, in the model's own formats; every tensor finds its place.

    Raises:
        UserError: the first missing, unexpected or differently shaped tensor, by name.
    """
    own, kinds = model.state_dict(), own_kinds(weights)
    for name in [*own, *kinds]:
        if name not in kinds or name not in own:
            what = "missing" if name not in kinds else "not of this model"
            raise UserError(f"{where}: tensor {name} is {what}")
        theirs, ours = kinds[name].shape, tuple(own[name].shape)
        if theirs != ours:
            raise UserError(f"{where}: tensor {name} is {theirs}, the model's {ours}")
    for name, tensor in own.items():
        rows = tensor.view(kinds[name].rows, kinds[name].width)
        for low, high in chunks(kinds[name], 0, kinds[name].rows):
            rows[low:high] = weights.values(name, low, high, tensor.dtype)
