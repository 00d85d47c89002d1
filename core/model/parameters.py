"""A model's weights as optimizers receive them, each with its role and kind."""

from collections.abc import Iterable, Sequence

from torch import nn
from torch.optim import Optimizer

from core.contracts.training import NamedParameter, ParameterKind


def named_parameters(model: nn.Module) -> list[NamedParameter]:
    """Every weight of a model once, in the order of its modules."""
    found: list[NamedParameter] = []
    known: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in known:  # a weight that two modules share has the name of the first
                continue
            known.add(id(parameter))
            role = getattr(module, "role", "")
            full_name = f"{path}.{name}" if path else name
            found.append(NamedParameter(full_name, parameter, role, kind_of(parameter.ndim, role)))
    return found


def kind_of(axes: int, role: str) -> ParameterKind:
    """The kind of a weight with this many axes and this role."""
    if axes < 2:
        return "vector"
    if role == "embedding":
        return "table"
    return "matrix" if axes == 2 else "stack"


def check_groups(optimizers: Iterable[Optimizer], parameters: Sequence[NamedParameter]) -> None:
    """Checks that every weight is in exactly one group of one optimizer.

    Raises:
        ValueError: one is in none, or in several.
    """
    held: dict[int, int] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                held[id(parameter)] = held.get(id(parameter), 0) + 1
    for named in parameters:
        groups = held.get(id(named.parameter), 0)
        if groups != 1:
            how_many = "no group" if not groups else f"{groups} groups"
            raise ValueError(
                f"the optimizer has the weight {named.name} in {how_many}; it must be in one"
            )
