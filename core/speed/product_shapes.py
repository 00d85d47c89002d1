"""The matrix products of one training step, with their shapes, from a recipe and the loads of its experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.analysis.describe import RecordingPrecision
from core.analysis.products import MatrixProduct, Products, products_in
from core.assemble import build, make
from core.model.block import Block
from core.model.language_model import LanguageModel
from core.recipe.compose import Recipe

PLAIN = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Formats whose products torch's own kernels take; a product in any other format is timed in bf16."""


@dataclass(frozen=True)
class LinearShape:
    """A product of all tokens with one matrix.

    Args:
        rows: tokens.
        inputs, outputs: widths.
        dtype: format of the operands.
    """

    rows: int
    inputs: int
    outputs: int
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        """FLOPs of the product and of its two gradients."""
        return 6 * self.rows * self.inputs * self.outputs


@dataclass(frozen=True)
class ExpertsShape:
    """A product of routed rows with the matrices of their experts.

    Args:
        loads: rows of each expert.
        inputs, outputs: widths.
        dtype: format of the operands.
    """

    loads: tuple[int, ...]
    inputs: int
    outputs: int
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        """FLOPs of the products and of their gradients."""
        return 6 * sum(self.loads) * self.inputs * self.outputs


@dataclass(frozen=True)
class AttentionShape:
    """Attention over the sequence.

    Args:
        sequences, length: the micro-batch.
        heads, key_heads: the heads of queries, and those of keys and values.
        key, value: widths of a head.
        dtype: format of the operands.
    """

    sequences: int
    length: int
    heads: int
    key_heads: int
    key: int
    value: int
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        """FLOPs of scores, outputs and their gradients over the causal half, without scores that are formed again."""
        pairs = self.sequences * self.heads * self.length**2
        return 3 * pairs * (self.key + self.value)


ProductShape = LinearShape | ExpertsShape | AttentionShape


def product_shapes(recipe: Recipe, loads: Sequence[Mapping[str, Tensor]]) -> list[ProductShape]:
    """The products of one step of a recipe, one micro-batch after the other.

    In each come linear layers and experts in the order of the model, then attention.

    Args:
        recipe: its model and its micro-batch.
        loads: the int64 rows of each expert in each micro-batch, by block path.
    """
    precision = RecordingPrecision(make(recipe.precision))
    model = build(recipe, device="meta", precision=precision)
    found: list[ProductShape] = []
    for in_batch in loads:
        found += _weight_products(recipe, model, precision, in_batch)
        for block in model.modules():
            if isinstance(block, Block):
                found += _attention_shapes(block, recipe, precision)
    return found


def _weight_products(
    recipe: Recipe,
    model: LanguageModel,
    precision: RecordingPrecision,
    loads: Mapping[str, Tensor],
) -> list[ProductShape]:
    """The products with weights of one micro-batch."""
    tokens = recipe.batch.sequences * recipe.data.sequence_length
    routed = _routed(model, precision.made, loads)
    found: list[ProductShape] = []
    for layer, product in products_in(model, precision.made):
        dtype = _plain(precision.compute_dtype(product.role))
        if layer in routed:
            found.append(ExpertsShape(routed[layer], product.inputs, product.outputs, dtype))
        else:
            found.append(LinearShape(tokens, product.inputs, product.outputs, dtype))
    if model.output not in precision.made:  # it shares the embedding's weight
        vocabulary, dim = model.embedding.weight.shape
        dtype = _plain(precision.compute_dtype("head"))
        found.append(LinearShape(tokens, dim, vocabulary, dtype))
    return found


def _plain(dtype: torch.dtype) -> torch.dtype:
    """The format in which a product is timed."""
    return dtype if dtype in PLAIN else torch.bfloat16


def _routed(
    model: LanguageModel, products: Products, loads: Mapping[str, Tensor]
) -> dict[nn.Module, tuple[int, ...]]:
    """The rows of each grouped layer's experts in one micro-batch."""
    found = {}
    for path, load_E in loads.items():
        rows = tuple(load_E.tolist())
        for layer, product in products_in(model.get_submodule(path), products):
            if product.groups:
                found[layer] = rows
    return found


def _attention_shapes(
    block: Block, recipe: Recipe, precision: RecordingPrecision
) -> list[AttentionShape]:
    """The shape of a block's attention over the sequence, from its products; empty for an attention without heads."""
    by_role: dict[str, MatrixProduct] = {}
    for _, product in products_in(block.attention, precision.made):
        by_role[product.role] = product
    queries = by_role.get("attention.q_up") or by_role.get("attention.q")
    output = by_role.get("attention.output")
    config = getattr(block.attention, "config", None)
    heads = getattr(block.attention, "heads", None) or getattr(config, "heads", None)
    if not heads or queries is None or output is None:
        return []
    key = queries.outputs // heads
    keys = by_role.get("attention.k")
    shape = AttentionShape(
        sequences=recipe.batch.sequences,
        length=recipe.data.sequence_length,
        heads=heads,
        key_heads=keys.outputs // key if keys else heads,
        key=key,
        value=output.inputs // heads,
        dtype=_plain(precision.compute_dtype("attention.output")),
    )
    return [shape]
