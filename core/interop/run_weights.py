"""The weights of a run, from a checkpoint of our training or from the files of a converted run."""

from pathlib import Path
from typing import Any

import torch

from core.checkpoints.averages import averaged_tensors, missing_average
from core.checkpoints.reading import open_shards, read_checkpoint, read_metadata
from core.interop.shard_rows import ShardRows, specs_of
from core.interop.shards import shards_of
from core.interop.tensors import SCALE, InMemoryTensors, TensorReader, TensorSpec
from core.training.run_folder import WEIGHTS_INDEX, RunFolder


def check_average(checkpoint: Path, average: str) -> None:
    """Raises `UserError` unless a checkpoint holds averaged weights of a name; their numbers are not used."""
    if is_converted(checkpoint):
        raise missing_average(average, checkpoint, ())
    averaged_tensors(read_metadata(checkpoint), average, checkpoint)


def is_converted(checkpoint: Path) -> bool:
    """Returns whether a checkpoint is the index of a converted run's weights, not a file that our training wrote."""
    return checkpoint.name == WEIGHTS_INDEX


def weights_of(checkpoint: Path, average: str | None = None) -> TensorReader:
    """Returns the model's tensors of a checkpoint, or of the index of a converted run.

    Those of a sharded checkpoint and of a converted run are read when they are asked for.

    Args:
        checkpoint: the checkpoint.
        average: takes these averaged weights in place of those that were trained.

    Raises:
        UserError: a file is damaged, has changed, or was not written by this program, or there is no such average.
    """
    if is_converted(checkpoint):
        if average is not None:
            raise missing_average(average, checkpoint, ())
        shards = shards_of(checkpoint.parent)
        RunFolder(checkpoint.parent.parent).check_digests(checkpoint.parent.name)
        return shards
    if checkpoint.is_dir():
        return ShardRows(checkpoint, average)
    tensors = {}
    for name, value in state_of(checkpoint, average).items():
        if torch.is_tensor(value) and not name.endswith("_extra_state"):
            tensors[name] = value
    return InMemoryTensors(tensors)


def shapes_of(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the model's tensors; of a sharded checkpoint or a converted run no number is read.

    Raises:
        UserError: a file is damaged, has changed, or was not written by this program.
    """
    if checkpoint.is_dir():
        return {name: spec.shape for name, spec in specs_of(open_shards(checkpoint)).items()}
    if is_converted(checkpoint):
        return {name: spec.shape for name, spec in model_specs(weights_of(checkpoint)).items()}
    return {name: tuple(tensor.shape) for name, tensor in state_of(checkpoint).items()}


def reads_rows(checkpoint: Path) -> bool:
    """Returns whether `weights_of` reads the tensors of a checkpoint a few rows at a time."""
    return is_converted(checkpoint) or checkpoint.is_dir()


def state_of(checkpoint: Path, average: str | None = None) -> dict[str, Any]:
    """Returns the model's state dict, from a checkpoint that our training wrote.

    Args:
        checkpoint: the checkpoint.
        average: takes these averaged weights in place of those that were trained; all else is the same.

    Raises:
        UserError: the file is damaged, or was not written by this program, or there is no such average.
    """
    content = read_checkpoint(checkpoint)
    state = content["state_dict"]
    if average is not None:
        state = {**state, **averaged_tensors(content, average, checkpoint)}
    return {
        name.removeprefix("model."): value
        for name, value in state.items()
        if name.startswith("model.")
    }


def model_specs(weights: TensorReader) -> dict[str, TensorSpec]:
    """Returns the specifications of the model's tensors, without the scales of FP8 codes."""
    found = {}
    for name, spec in weights.specs.items():
        is_scale = name.endswith(SCALE) and name.removesuffix(SCALE) in weights.specs
        if not is_scale:
            found[name] = spec
    return found
