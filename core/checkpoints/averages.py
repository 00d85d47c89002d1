"""Averaged weights in a checkpoint, which is still a checkpoint of the weights that are trained.

The part `averages` of its content has an entry for each average: `settings`, `updates`, and `weights` by the names that
they have in the part `state_dict`. In a sharded checkpoint the tensors of `weights` are in the index.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from core.checkpoints.index import ShardIndex
from core.checkpoints.listing import other_checkpoints
from core.contracts.errors import UserError
from core.contracts.training import WeightAverage
from core.numerics.finite import not_finite_in

AVERAGES = "averages"
"""The key of the part, and how the names of its tensors begin in an index; then follow the average and the tensor."""


def index_prefix(average: str) -> str:
    """How the names of an average's tensors begin in the index of a sharded checkpoint."""
    return f"{AVERAGES}.{average}."


def averages_in_index(index: ShardIndex) -> list[str]:
    """The names of the averages of which a sharded checkpoint holds tensors."""
    found: dict[str, None] = {}
    for name in index.tensors:
        if name.startswith(f"{AVERAGES}."):
            found[name.split(".", 2)[1]] = None
    return list(found)


def missing_average(name: str, file: Path, known: Collection[str]) -> UserError:
    """The error about a checkpoint without the average that a command asks for."""
    why = "its run keeps no average, or had not begun it"
    if known:
        why = f"it holds {', '.join(known)}"
    return UserError(f"--weights {name}: {file} holds no average of this name: {why}")


def averaged_tensors(content: Mapping[str, Any], name: str, file: Path) -> dict[str, Tensor]:
    """The tensors of an average in the content of a checkpoint, by their names in its `state_dict`.

    Raises:
        UserError: it has none.
    """
    begun: dict[str, dict[str, Tensor]] = {}
    averages = content.get(AVERAGES)
    for key, value in averages.items() if isinstance(averages, dict) else ():
        if isinstance(value, dict) and value.get("weights"):
            begun[str(key)] = value["weights"]
    if name not in begun:
        raise missing_average(name, file, begun)
    return begun[name]


def not_finite_average(content: Mapping[str, Any]) -> str | None:
    """A sentence about an averaged weight that is not finite; None if all are."""
    averages = content.get(AVERAGES)
    for name, value in averages.items() if isinstance(averages, dict) else ():
        weights = value.get("weights") if isinstance(value, dict) else None
        found = not_finite_in(weights) if isinstance(weights, dict) else None
        if found:
            return f"in the average {name}, {found}"
    return None


def check_averages(
    averages: Sequence[WeightAverage],
    weights: Collection[str],
    content: Mapping[str, Any],
    file: Path,
) -> list[str]:
    """Compares the averages that a run keeps with those of the checkpoint that it continues from.

    Args:
        averages: those that the recipe asks for.
        weights: the names of all weights in the part `state_dict`.
        content: the checkpoint's.
        file: the checkpoint.

    Returns:
        Notes about averages that only one of the two has.

    Raises:
        UserError: an average has other settings there, or is damaged.
    """
    stored = content.get(AVERAGES, {})
    if not isinstance(stored, dict):
        raise _damaged(file, f"{AVERAGES}: must be a section of keys")
    notes: list[str] = []
    for average in averages:
        if average.name in stored:
            _check_average(average, stored[average.name], weights, content["state_dict"], file)
        else:
            notes.append(f"{average.name}: {file.name} holds no such average, so it begins anew")
    kept = [average.name for average in averages]
    for name in stored:
        if name not in kept:
            dropped = "later checkpoints will not, as the recipe does not ask for it"
            notes.append(f"{name}: {file.name} holds this average, and {dropped}")
    return notes


def _check_average(
    average: WeightAverage,
    stored: Any,
    expected: Collection[str],
    state: Mapping[str, Any],
    file: Path,
) -> None:
    """Raises `UserError` unless an average can be continued from what a checkpoint holds."""
    where = f"{AVERAGES}.{average.name}"
    if not isinstance(stored, dict):
        raise _damaged(file, f"{where}: must be a section of keys")
    settings = stored.get("settings")
    weights = stored.get("weights")
    updates = stored.get("updates")
    if not isinstance(settings, dict) or not isinstance(weights, dict):
        raise _damaged(file, f"{where}: settings and weights are missing or damaged")
    if type(updates) is not int or updates < 0:
        raise _damaged(file, f"{where}.updates = {updates!r}: must be a whole number")
    for key, value in average.settings.items():
        if settings.get(key) != value:
            before = f"the average in {file} has {settings.get(key)}"
            raise UserError(f"--resume: callbacks: {average.name}: {key} = {value}: {before}")
    if bool(weights) != (updates > 0):
        raise _damaged(file, f"{where}: {len(weights)} tensors after {updates} updates")
    for name in expected if weights else ():
        if name not in weights:
            raise _damaged(file, f"{where}: tensor {name} is missing")
    for name, value in weights.items():
        whole = state.get(name) if name in expected else None
        if not isinstance(whole, Tensor) or not isinstance(value, Tensor):
            raise _damaged(file, f"{where}: {name} is no tensor of the model")
        if value.shape != whole.shape:
            shapes = f"{list(value.shape)}, the model's {list(whole.shape)}"
            raise _damaged(file, f"{where}: tensor {name} is {shapes}")


def _damaged(file: Path, what: str) -> UserError:
    return UserError(f"{file}: the run cannot continue: {what}{other_checkpoints(file)}")
