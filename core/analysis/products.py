"""The matrix products of a described model, with the role of each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class MatrixProduct:
    """One matrix-product layer.

    Args:
        role: what it is for, one of `core.contracts.precision.ROLES`.
        inputs, outputs: its widths.
        groups: how many of them one grouped layer holds; 0 for a single one.
    """

    role: str
    inputs: int
    outputs: int
    groups: int = 0


Products = Mapping[nn.Module, MatrixProduct]
"""Every layer that the precision made, with the product that was requested."""


def products_in(module: nn.Module, products: Products) -> Iterator[tuple[nn.Module, MatrixProduct]]:
    """The matrix-product layers of a part of the model, in the order of its modules."""
    for part in module.modules():
        if part in products:
            yield part, products[part]
