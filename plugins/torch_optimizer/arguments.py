"""Classes of torch.optim by name, and their arguments, checked against the signatures of their constructors."""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch.optim import Optimizer

from core.contracts.errors import ConfigError, nearest

ELEMENTWISE = frozenset(
    {
        "ASGD",
        "Adadelta",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    }
)
"""Classes that update every number by its own gradient alone, so that parts of a weight can be updated apart.

A class that is not listed may look across a matrix (Adafactor, Muon).
"""

OWN = {
    "params": "the weights are chosen by groups",
    "lr": "the learning rate is optimizer.lr, and of a group lr_scale times it",
    "maximize": "it would climb the loss",
    "differentiable": "no step is differentiated through",
    "capturable": "no step is captured in a CUDA graph",
}
"""Arguments of constructors that a recipe cannot give, each with the reason."""


@cache
def algorithms() -> dict[str, type[Optimizer]]:
    """The classes of torch.optim by name."""
    found = {}
    for name, value in vars(torch.optim).items():
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer:
            found[name] = value
    return found


def check_algorithm(key: str, name: str) -> None:
    """Raises `ConfigError` for a class that does not exist, or that this training step cannot drive."""
    known = algorithms()
    if name not in known:
        same = [one for one in known if one.lower() == name.lower()]
        meant = f"did you mean {same[0]}?" if same else nearest(name, known)
        raise ConfigError(key, f"torch.optim has no such class; {meant}")
    closure = inspect.signature(known[name].step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        why = "it needs a closure that computes the loss several times in a step, and a step here computes it once"
        raise ConfigError(key, why)
    if name == "SparseAdam":
        raise ConfigError(key, "it takes sparse gradients only, and gradients here are dense")


def check_arguments(key: str, algorithm: str, arguments: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for an argument that the class does not have, or with a value that it does not take."""
    hints = _hints(algorithm)
    for name, value in arguments.items():
        if name in OWN:
            raise ConfigError(f"{key}.{name}", f"must not be given: {OWN[name]}")
        if name not in hints:
            known = nearest(str(name), hints)
            raise ConfigError(f"{key}.{name}", f"{algorithm} has no such argument; {known}")
        if not _fits(value, hints[name]):
            raise ConfigError(f"{key}.{name}", f"must be {_in_words(hints[name])}")
    # torch's own checks of values: a matrix suits every class
    try:
        make(algorithm, [torch.zeros(2, 2, requires_grad=True)], arguments)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(key, f"{algorithm}: {' '.join(str(error).split())}") from error


def make(algorithm: str, parameters: Any, arguments: Mapping[str, Any]) -> Optimizer:
    """Makes an optimizer; its learning rate is set before each step.

    Args:
        algorithm: the class.
        parameters: weights or groups, as every torch optimizer takes them.
        arguments: its constructor's, as a recipe gives them.
    """
    constructor: Callable[..., Optimizer] = algorithms()[algorithm]
    return constructor(parameters, lr=0.0, **in_torchs_form(arguments))


def in_torchs_form(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with tuples in the place of a recipe's lists."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in arguments.items()}


@cache
def _hints(algorithm: str) -> dict[str, Any]:
    """The types of the arguments that a recipe can give, by name."""
    constructor = algorithms()[algorithm].__init__
    hints = get_type_hints(constructor)
    names = list(inspect.signature(constructor).parameters)[1:]
    return {name: hints.get(name, Any) for name in names if name not in OWN}


def _kinds(hint: Any) -> list[Any]:
    """The types of a union but tensors, which no recipe can hold; the type itself if it is none."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [kind for kind in kinds if kind is not torch.Tensor]


def _fits(value: Any, hint: Any) -> bool:
    return any(_is_of(value, kind) for kind in _kinds(hint))


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a plain value is of a type; a whole number is a number, and true is none."""
    if kind is Any:
        return True
    if kind in (bool, str, NoneType):
        return isinstance(value, kind)
    if kind is int:
        return type(value) is int
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if get_origin(kind) is tuple:
        items = get_args(kind)
        if not isinstance(value, list | tuple) or len(value) != len(items):
            return False
        return all(_fits(item, hint) for item, hint in zip(value, items, strict=True))
    return False


def _in_words(hint: Any) -> str:
    """What a type allows, for an error message."""
    words = {bool: "true or false", str: "a string", NoneType: "null", int: "a whole number"}
    words |= {float: "a finite number", Any: "anything"}
    found = []
    for kind in _kinds(hint):
        if get_origin(kind) is tuple:
            items = get_args(kind)
            found.append(f"a list of {len(items)}: {', '.join(map(_in_words, items))}")
        else:
            found.append(words.get(kind, str(kind)))
    return " or ".join(found)
