"""Frozen parts of a model: weights that are not trained, and balancers whose state is not updated."""

from collections.abc import Sequence

from torch import nn

from core.contracts.balancer import Balancer
from core.contracts.errors import ConfigError
from core.contracts.name_patterns import check_chosen, chosen_by


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes the weights and balancers of a model that patterns choose by name.

    A frozen weight has no gradient, so no optimizer receives it and no decay changes it. A balancer with a chosen
    tensor in its state keeps all of it (`Balancer.is_frozen`); its loss, if it has one, still trains the router.

    Raises:
        ConfigError: a pattern chooses nothing, or nothing is left to train.
    """
    if not patterns:
        return
    weights = dict(model.named_parameters())
    states: dict[str, Balancer] = {}
    for path, module in model.named_modules():
        if isinstance(module, Balancer):
            states |= {f"{path}.{name}": module for name in module.state_dict()}
    names = [*weights, *(name for name in states if name not in weights)]
    check_chosen(patterns, names, "freeze")
    chosen = chosen_by(patterns, names)
    for name in chosen:
        if name in states:
            states[name].is_frozen = True
        if name in weights:
            weights[name].requires_grad_(False)
    if not any(weight.requires_grad for weight in weights.values()):
        raise ConfigError("freeze", f"{', '.join(patterns)} leaves no weight to train")


def frozen_in(model: nn.Module) -> list[str]:
    """The names of a model's frozen weights and of the states of its frozen balancers, in the order of the model."""
    found = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    for path, module in model.named_modules():
        if isinstance(module, Balancer) and module.is_frozen:
            found += [f"{path}.{name}" for name in module.state_dict()]
    return found
