"""Layers, models and settings for these tests."""

from typing import Any

import torch
from torch import Tensor, nn

from core.contracts.precision import Precision
from core.extension.loader import find_plugins, load_plugins
from core.recipe.resolve import Resolver

REGISTRY = load_plugins([owner for owner in find_plugins() if owner.distribution == "moeloom"])


def precision(name: str = "fp8_emulated", **settings: Any) -> Precision:
    """A precision with these keys, checked as a recipe's are."""
    resolver = Resolver(REGISTRY, lambda _: "test", {})
    section = resolver.component("precision", {"name": name, **settings}, "precision", None)
    made: Precision = section.component(section.config)
    return made


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers whose rows have scales of their own, over six powers of two."""
    generator = torch.Generator().manual_seed(seed)
    size = 2.0 ** torch.randint(-3, 4, (*shape[:-1], 1), generator=generator)
    return torch.randn(shape, generator=generator) * size


def with_weight(layer: Any, seed: int = 1) -> Any:
    """The same layer with a weight of these numbers."""
    with torch.no_grad():
        layer.weight.copy_(drawn(*layer.weight.shape, seed=seed))
    return layer


def through(
    layer: nn.Module, x: Tensor, dy: Tensor, *more: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Y, dX and dW."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x, *more)
    y.backward(dy)
    assert x.grad is not None
    gradient = layer.weight.grad
    assert isinstance(gradient, Tensor)
    return y.detach(), x.grad, gradient
