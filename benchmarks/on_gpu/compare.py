"""Distances between tensors, and the layers and random tensors on which precisions are compared."""

from typing import Any

import torch
from torch import Tensor

import core
from core.assemble import make
from core.contracts.component import Environment
from core.contracts.precision import Precision
from core.contracts.schema import Section

PRODUCTS = ("y", "dX", "dW")

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def calc_diff(one: Tensor, two: Tensor) -> float:
    """The distance 1 - 2 <x, y> / (|x|^2 + |y|^2) in fp64, as DeepGEMM's tests compute it; 0 for two zeros."""
    one, two = (t.detach().to("cpu", torch.float64) for t in (one, two))
    size = float((one.square() + two.square()).sum())
    return float(1 - 2 * (one * two).sum() / size) if size else 0.0


def differing(one: Tensor, two: Tensor) -> int:
    """The number of elements with different bits; all NaNs count as the same."""
    one, two = (t.detach().cpu() for t in (one, two))
    if not one.is_floating_point():
        return int((one != two).sum())
    bits = [x.contiguous().view(BITS[x.element_size()]) for x in (one, two)]
    return int(((bits[0] != bits[1]) & ~(one.isnan() & two.isnan())).sum())


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal random numbers; each row has a random scale between 2^-3 and 2^3."""
    generator = torch.Generator().manual_seed(seed)
    size = 2.0 ** torch.randint(-3, 4, (*shape[:-1], 1), generator=generator)
    return (torch.randn(shape, generator=generator) * size).to(dtype)


def section_of(text: str) -> Section:
    """The section of a precision such as `{name: fp8_native}`, checked as a recipe's is."""
    return core.compose("dsv3_small", [f"precision={text}"]).precision


def obstacle(section: Section, device: str) -> str | None:
    """The reason why a precision cannot run on this device, in the words of the precision; None if it can."""
    cuda = device == "cuda"
    capability = torch.cuda.get_device_capability() if cuda else None
    why: str | None = section.component.requires(
        section.config, Environment(device, capability, torch.version.cuda)
    )
    return why


def precision_of(text: str) -> Precision:
    """The precision that a section describes."""
    made: Precision = make(section_of(text))
    return made


def layer_of(
    precision: Precision, role: str, inputs: int, outputs: int, groups: int, device: str
) -> Any:
    """A layer of a role with the same random weight in every precision; with 0 groups it is not a grouped layer."""
    made = precision.grouped_linear(groups, inputs, outputs, role, std=0.1) if groups else None
    layer: Any = made or precision.linear(inputs, outputs, role, std=0.1)
    with torch.no_grad():
        layer.weight.copy_(drawn(*layer.weight.shape, seed=1))
    return layer.to(device)


def three_products(layer: Any, x: Tensor, dy: Tensor, *more: Tensor) -> dict[str, Tensor]:
    """The output Y and the gradients dX and dW of one forward and backward."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x, *more)
    y.backward(dy.to(y.dtype))
    assert x.grad is not None
    return dict(zip(PRODUCTS, (y.detach(), x.grad, layer.weight.grad), strict=True))


def short(value: float) -> float:
    """The value with three significant digits, for long lists."""
    return float(f"{value:.3g}")
