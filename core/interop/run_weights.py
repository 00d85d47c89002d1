"""The weights of a run, wherever they are: a checkpoint of our training, or the files of a converted run."""

from pathlib import Path
from typing import Any

import torch

from core.interop.shards import shards_of
from core.interop.tensors import SCALE, Kind, Loaded, Tensors
from core.training.checkpoints import read_checkpoint
from core.training.folder import WEIGHTS_INDEX


def is_converted(checkpoint: Path) -> bool:
    """Whether a checkpoint is the index of a converted run's weights, not a file that our training wrote."""
    return checkpoint.name == WEIGHTS_INDEX


def weights_of(checkpoint: Path) -> Tensors:
    """The model's tensors of a checkpoint file or of a converted run's index.

    Raises:
        UserError: it is damaged or not ours.
    """
    if is_converted(checkpoint):
        return shards_of(checkpoint.parent)
    tensors = {name: tensor for name, tensor in state_of(checkpoint).items() if torch.is_tensor(tensor)}
    return Loaded({name: tensor for name, tensor in tensors.items() if not name.endswith("_extra_state")})


def state_of(checkpoint: Path) -> dict[str, Any]:
    """The model's state dict, from a checkpoint file that our training wrote.

    Raises:
        UserError: it is damaged or not ours.
    """
    state = read_checkpoint(checkpoint)["state_dict"]
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


def own_kinds(weights: Tensors) -> dict[str, Kind]:
    """The tensors without the scales of FP8 codes."""
    kinds = weights.kinds
    return {n: kind for n, kind in kinds.items() if not (n.endswith(SCALE) and n.removesuffix(SCALE) in kinds)}
