"""Checks what a checkpoint holds before a run continues from it, so that no step finds out."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from core.checkpoints.averages import not_finite_average
from core.checkpoints.listing import STEP, other_checkpoints
from core.contracts.errors import NotFiniteError, UserError
from core.numerics.finite import holds_nan, not_finite_in

COUNTS = ("windows_done", "skipped_steps", "skipped_in_a_row", "assigned", "dropped", "threads")
"""Whole numbers in the part `moeloom`."""

SECONDS = ("seconds", "wall_seconds")
"""Numbers in the part `moeloom`."""

SECTIONS = ("validated", "step_states", "paths")
"""Mappings in the part `moeloom`."""

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
"""States of torch's optimizers that the next update adds to a weight."""

LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""Tensors of torch's optimizers that have the shape of their parameter."""


def check_content(content: Mapping[str, Any], file: Path) -> None:
    """Checks the parts of a checkpoint from which a run continues.

    Raises:
        UserError: a part is missing or damaged.
    """
    parts = (("moeloom", dict), ("optimizer_states", list), ("loops", dict), ("callbacks", dict))
    for key, kind in parts:
        if key not in content:
            raise _damaged(file, f"its part {key} is missing, without which no run can continue")
        if not isinstance(content[key], kind):
            raise _damaged(file, f"its part {key} is {type(content[key]).__name__}")
    for number, state in enumerate(content["optimizer_states"]):
        values = state.get("state") if isinstance(state, dict) else None
        if not isinstance(values, dict) or not all(isinstance(v, dict) for v in values.values()):
            raise _damaged(file, f"optimizer_states.{number}.state is missing or damaged")
    own = content["moeloom"]
    for key in COUNTS:
        if type(own.get(key)) is not int or own[key] < 0:
            raise _damaged(file, f"moeloom.{key} = {own.get(key)!r}: must be a whole number")
    for key in SECONDS:
        if type(own.get(key)) not in (int, float):
            raise _damaged(file, f"moeloom.{key} = {own.get(key)!r}: must be a number")
    for key in SECTIONS:
        if not isinstance(own.get(key, {}), dict):
            raise _damaged(file, f"moeloom.{key}: must be a section of keys")
    for name, value in own.get("validated", {}).items():
        if type(value) not in (int, float):
            raise _damaged(file, f"moeloom.validated.{name} = {value!r}: must be a number")
    if "spikes" in own and not _are_norms(own["spikes"]):
        raise _damaged(file, "moeloom.spikes: must hold the norms of steps")
    for path, value in _leaves(content["loops"], "loops"):
        if not isinstance(value, int | float | None):
            raise _damaged(file, f"{path} = {str(value)[:40]!r}: must be a number")
    _check_progress(content, file)


def _are_norms(kept: Any) -> bool:
    """Whether the history of gradient norms is whole."""
    if not isinstance(kept, dict) or not isinstance(kept.get("learning"), str):
        return False
    norms = kept.get("norms")
    if not isinstance(norms, list):
        return False
    return all(type(norm) is float and 0 <= norm < math.inf for norm in norms)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields the key path and the value of every value in nested containers that is not a container itself."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        yield path, value
        return
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}")


def _check_progress(content: Mapping[str, Any], file: Path) -> None:
    """Raises `UserError` unless the file's name and Lightning's counters agree on the step."""
    step = content["moeloom"]["windows_done"]
    named = STEP.fullmatch(file.name)
    if named and int(named[1]) != step:
        raise _damaged(file, f"its name says step {int(named[1])}, and its content step {step}")
    loop = content["loops"].get("fit_loop")
    progress = loop.get("epoch_loop.batch_progress") if isinstance(loop, dict) else None
    counted = progress.get("current") if isinstance(progress, dict) else None
    begun = counted.get("ready") if isinstance(counted, dict) else None
    if begun != step:
        raise _damaged(file, f"loops: counts {begun!r} steps, and {step} are done")


def not_finite(content: Mapping[str, Any]) -> str | None:
    """A sentence about a number that is not finite in weights, averages or an optimizer; None if there is none.

    An infinity in an optimizer's state is allowed, but for first moments: a squared gradient can overflow in a run that
    goes on. Tensors on the meta device have no numbers.
    """
    found = not_finite_in(content["state_dict"])
    if found is None:
        found = _not_finite_in_optimizers(content.get("optimizer_states", []))
    if found is None:
        found = not_finite_average(content)
    return found


def diverged(file: Path, found: str) -> NotFiniteError:
    """The error about a checkpoint with a number that is not finite."""
    how = "the run has diverged, and cannot be continued from here"
    return NotFiniteError(f"{file}: {found}; {how}: start it again with a lower optimizer.lr")


def _not_finite_in_optimizers(optimizers: Sequence[Mapping[str, Any]]) -> str | None:
    """A sentence about the first number of an optimizer that cannot be continued with; None without one."""
    for number, optimizer in enumerate(optimizers):
        for parameter, values in optimizer.get("state", {}).items():
            for key, value in values.items():
                if not isinstance(value, Tensor) or value.is_meta:
                    continue
                where = f"{key} of parameter {parameter}"
                if holds_nan(value):
                    return f"optimizer {number} has a NaN in {where}"
                if key in FIRST_MOMENTS and not bool(value.isfinite().all()):
                    return f"optimizer {number} has an infinity in {where}"
        for group in optimizer.get("param_groups", []):
            for key, value in group.items():
                if isinstance(value, float) and not math.isfinite(value):
                    return f"optimizer {number} has {key} = {value}"
    return None


def check_model(model: nn.Module, content: Mapping[str, Any], file: Path) -> None:
    """Compares the tensors of a checkpoint with those of the model that it continues.

    Raises:
        UserError: the first missing, unexpected or differently shaped tensor, by name.
    """
    theirs: dict[str, Any] = {}
    for name, value in content["state_dict"].items():
        theirs[str(name).removeprefix("model.")] = value
    ours = model.state_dict()
    for name in [*ours, *theirs]:
        if name not in theirs:
            raise _damaged(file, f"tensor {name} is missing")
        if name not in ours:
            raise _damaged(file, f"tensor {name} is not of this model")
        mine = ours[name]
        value = theirs[name]
        if not isinstance(mine, Tensor):
            continue
        if not isinstance(value, Tensor):
            raise _damaged(file, f"tensor {name} is {type(value).__name__}")
        if value.shape != mine.shape:
            shapes = f"{list(value.shape)}, the model's {list(mine.shape)}"
            raise _damaged(file, f"tensor {name} is {shapes}")
        if value.dtype != mine.dtype:
            raise _damaged(file, f"tensor {name} is {value.dtype}, the model's {mine.dtype}")


def check_optimizers(
    optimizers: Sequence[Optimizer], content: Mapping[str, Any], file: Path
) -> None:
    """Compares the states of the optimizers in a checkpoint with the optimizers that take them.

    Raises:
        UserError: a state is missing or damaged, or belongs to other parameters.
    """
    states = content["optimizer_states"]
    if len(states) != len(optimizers):
        raise _damaged(file, f"optimizer_states: {len(states)} for {len(optimizers)} optimizers")
    for number, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        found = _fault_in(optimizer, state)
        if found:
            raise _damaged(file, f"optimizer_states.{number}: {found}")


def _fault_in(optimizer: Optimizer, state: Any) -> str | None:
    """What is wrong with the state of one optimizer; None for nothing."""
    if not isinstance(state, dict):
        return f"is {type(state).__name__}"
    groups = state.get("param_groups")
    values = state.get("state")
    if not isinstance(groups, list) or not isinstance(values, dict):
        return "state and param_groups are missing or damaged"
    fresh = optimizer.state_dict()["param_groups"]
    if len(groups) != len(fresh):
        return f"{len(groups)} groups of parameters, and the run has {len(fresh)}"
    for index, (theirs, ours) in enumerate(zip(groups, fresh, strict=True)):
        if not isinstance(theirs, dict) or set(ours) - set(theirs):
            return f"param_groups.{index}: keys are missing"
        for key, value in ours.items():
            if not _is_alike(theirs[key], value):
                return f"param_groups.{index}.{key} = {str(theirs[key])[:40]}: is damaged"
        if theirs["params"] != ours["params"]:
            return f"param_groups.{index}.params: are not those of this run"
    return _fault_in_values(optimizer, values)


def _is_alike(theirs: Any, ours: Any) -> bool:
    """Whether a setting has the type of the run's own; a number may be written as another type of number."""
    numbers = (int, float)
    if type(ours) in numbers:
        return type(theirs) in numbers or isinstance(theirs, Tensor)
    if isinstance(ours, list | tuple):
        if not isinstance(theirs, list | tuple) or len(theirs) != len(ours):
            return False
        return all(map(_is_alike, theirs, ours))
    return ours is None or theirs is None or isinstance(theirs, type(ours))


def _fault_in_values(optimizer: Optimizer, values: Mapping[Any, Any]) -> str | None:
    """What is wrong with the values that an optimizer keeps for each parameter; None for nothing."""
    parameters: list[Tensor] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    kinds: dict[int, dict[str, type]] = {}
    for index, kept in values.items():
        if type(index) is not int or not 0 <= index < len(parameters):
            return f"state.{index}: is of no parameter of this run"
        if not isinstance(kept, dict):
            return f"state.{index}: is {type(kept).__name__}"
        own = {key: type(value) for key, value in kept.items()}
        # Adafactor, for example, keeps other values for matrices than for vectors
        if own != kinds.setdefault(parameters[index].ndim, own):
            return f"state.{index}: holds other values than that of the first parameter"
        for key in LIKE_PARAMETER:
            value = kept.get(key)
            if key in kept and getattr(value, "shape", None) != parameters[index].shape:
                shape = list(parameters[index].shape)
                return f"state.{index}.{key}: must have the shape {shape} of its parameter"
    return None


def _damaged(file: Path, what: str) -> UserError:
    return UserError(f"{file}: the run cannot continue: {what}{other_checkpoints(file)}")
