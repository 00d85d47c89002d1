"""Which matrix products a described model has, by what they are for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Product:
    """One matrix-product layer.

    Args:
        role: what it is for, one of `core.contracts.precision.ROLES`.
        inputs, outputs: its widths.
        groups: how many of them stand in one grouped layer; 0 for a single one.
    """

    role: str
    inputs: int
    outputs: int
    groups: int = 0


Products = Mapping[nn.Module, Product]
"""Every layer that the precision made, with what it was asked for."""


def products_in(module: nn.Module, products: Products) -> Iterator[tuple[nn.Module, Product]]:
    """Those that stand in a part of the model, in its order."""
    return ((part, products[part]) for part in module.modules() if part in products)
