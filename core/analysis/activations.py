"""Bytes per token that a backward pass needs from the forward pass, derived from the widths of the matrix products.

Counted is what the blocks of `core.model` and the built-in layers keep on a GPU, whose kernels store neither
attention's scores nor normalised copies in a norm (docs/describe.md has the formulas with a worked example). Not
counted: what is as narrow as a head or a choice (statistics of norms and attention, gates, indices), and the working
copies of the weights, which are counted as weights.

Three recomputation policies:

- `none`: everything is kept;
- `selective`: RMSNorms and the up-projections of latent attention are computed again (DeepSeek-V3 report, section
  3.2.3), so that inputs of norms are kept, and neither their outputs nor queries, keys and values;
- `full`: every block keeps its input and is computed again whole (the recipe's `recompute.blocks`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from core.analysis.products import MatrixProduct, Products, products_in
from core.contracts.loss_head import LossHead
from core.contracts.precision import Precision
from core.model.block import Block
from core.model.norm import RMSNorm

POLICIES = ("none", "selective", "full")
"""Recomputation policies, from the most memory to the least."""


@dataclass(frozen=True)
class ActivationBytes:
    """Activations in bytes per token, under each recomputation policy.

    Args:
        none, selective, full: kept from the forward pass to the backward pass.
        selective_again, full_again: needed on top while the backward pass computes one block again.
    """

    none: int = 0
    selective: int = 0
    full: int = 0
    selective_again: int = 0
    full_again: int = 0

    def __add__(self, other: "ActivationBytes") -> "ActivationBytes":
        """The activations of two parts, whose blocks are computed again one after the other."""
        return ActivationBytes(
            self.none + other.none,
            self.selective + other.selective,
            self.full + other.full,
            max(self.selective_again, other.selective_again),
            max(self.full_again, other.full_again),
        )

    def kept(self, policy: str) -> int:
        """Bytes kept from the forward pass to the backward pass under a policy."""
        return {"none": self.none, "selective": self.selective, "full": self.full}[policy]

    def recomputed(self, policy: str) -> int:
        """Bytes needed on top under a policy, while one block is computed again."""
        return {"none": 0, "selective": self.selective_again, "full": self.full_again}[policy]


class Widths:
    """Bytes per number in each place of the model.

    Args:
        precision: the recipe's.
    """

    def __init__(self, precision: Precision) -> None:
        stream = precision.compute_dtype("embedding")
        self.precision = precision
        self.stream = stream.itemsize
        self.wide = torch.promote_types(stream, torch.float32).itemsize

    def operand(self, product: MatrixProduct) -> int:
        """Bytes per number of a product's input, which is kept in the product's own format (FP8 for an FP8 product)."""
        return self.precision.compute_dtype(product.role).itemsize

    def operand_row(self, product: MatrixProduct) -> int:
        """Bytes per token of a product's input."""
        return product.inputs * self.operand(product)

    def norm(self, width: int) -> int:
        """Bytes per token of a norm's input, which the norm reads in fp32 or wider."""
        return width * self.wide


def block_activations(block: Block, products: Products, widths: Widths) -> ActivationBytes:
    """The activations of a block: the inputs of its two norms, and what the layers and residuals keep."""
    dim = block.attention_norm.dim
    attention = _attention(dict(_by_role(block.attention, products)), widths)
    attention = attention + _declared(block.attention, products, widths)
    ffn = _feed_forward(block, products, widths)
    norms = 2 * widths.norm(dim)
    residuals = 0
    for residual in (block.attention_residual, block.ffn_residual):
        residuals += residual.activation_bytes(widths.stream, widths.wide)
    none = norms + attention.none + ffn.none + residuals
    selective = 2 * dim * widths.stream + attention.selective + ffn.selective + residuals
    full = dim * widths.stream * block.attention_residual.streams
    return ActivationBytes(none, selective, full, none - selective, none)


def _by_role(module: nn.Module, products: Products) -> Iterable[tuple[str, MatrixProduct]]:
    """The usual products of attention with the last part of their roles: `q_up` for `attention.q_up`."""
    for _, product in products_in(module, products):
        first, _, last = product.role.partition(".")
        if first == "attention":
            yield last, product


def _declared(attention: nn.Module, products: Products, widths: Widths) -> ActivationBytes:
    """Activations of products with roles that an attention declares itself: their outputs, under every policy.

    Their inputs are taken to be what other products of the layer read, and are counted there. What grows with the
    square of the sequence is not counted.
    """
    outputs = 0
    for _, product in products_in(attention, products):
        if not product.role.startswith("attention."):
            outputs += product.outputs * widths.stream
    return ActivationBytes(outputs, outputs)


def _attention(by_role: dict[str, MatrixProduct], widths: Widths) -> ActivationBytes:
    """Activations of attention: latents, queries, keys, values and the heads' outputs.

    The products that read the block's normed state (`q`, `q_down`, `kv_down`, `k`, `v`) keep one copy of it. A latent
    is kept as its norm's input and as its up-projection's. Queries and keys are kept as rotated; latent attention
    builds its keys, as wide as the queries, beside the up-projection's output, which the values are a part of.
    """

    def found(*roles: str) -> list[MatrixProduct]:
        return [by_role[role] for role in roles if role in by_role]

    normed = max(map(widths.operand_row, found("q", "q_down", "kv_down", "k", "v")), default=0)
    up_projections = found("q_up", "kv_up")
    latent_norms = 0
    latent_operands = 0
    latents = 0
    for up in up_projections:
        latent_norms += widths.norm(up.inputs)
        latent_operands += widths.operand_row(up)
        latents += up.inputs
    queries_keys_values = sum(p.outputs for p in found("q", "q_up", "k", "v", "kv_up"))
    if "kv_up" in by_role:  # the keys that latent attention builds are as wide as its queries
        queries_keys_values += sum(p.outputs for p in found("q_up", "q")[:1])
    output = sum(map(widths.operand_row, found("output")))
    direct = sum(p.outputs for p in found("q", "k", "v"))  # no up-projection makes these again
    rotated = 0
    if "kv_up" in by_role and "kv_down" in by_role:
        rotated = by_role["kv_down"].outputs - by_role["kv_up"].inputs

    none = normed + latent_norms + latent_operands + queries_keys_values * widths.stream + output
    selective = (latents + direct + rotated) * widths.stream + output
    return ActivationBytes(none, selective)


def _feed_forward(block: Block, products: Products, widths: Widths) -> ActivationBytes:
    """Activations of a feed-forward layer: every input, both halves of the first product, and the second's input.

    A SwiGLU of width I keeps 2 I of the first product, silu(gate) and the second product's input. A routed expert
    keeps a row for each assignment, its own copy of the token and its output (for the gate's gradient) included; under
    expert parallelism a GPU receives as many assignments as it sends where the load is even. The normed state is
    kept once for the dense or shared layer, and once more in fp32 for the router where the stream is narrower.
    """
    properties = block.ffn.routing_properties
    top_k = properties.top_k if properties else 0
    dim = block.ffn_norm.dim
    kept = 0
    normed = 0
    for _, product in products_in(block.ffn, products):
        routed = bool(product.groups)
        rows = top_k if routed else 1
        operand = widths.operand_row(product)
        if product.role == "router":
            kept += 2 * product.outputs * widths.wide
            if widths.stream < widths.wide:
                normed += dim * widths.wide
        elif product.role.endswith("gate_up"):
            kept += rows * (product.outputs + product.outputs // 2) * widths.stream
            if routed:
                kept += rows * operand
            else:
                normed += operand
        else:
            kept += rows * operand
            if routed:
                kept += rows * product.outputs * widths.stream
    return ActivationBytes(kept + normed, kept)


def head_activations(
    head: LossHead, output: MatrixProduct, products: Products, widths: Widths
) -> ActivationBytes:
    """Activations of a loss head without its blocks: norms, projections, and logits for each use of the output.

    A head takes logits once, or once for each block of its own; their logarithms are kept in fp32 or wider, beside
    the state that they are made from.
    """
    blocks = [part for part in head.modules() if isinstance(part, Block)]
    inside = {inner for block in blocks for inner in block.modules()}
    norms = 0
    inputs = 0
    for part in head.modules():
        if part in inside:
            continue
        if isinstance(part, RMSNorm):
            norms += part.dim
        if part in products:
            inputs += widths.operand_row(products[part])
    uses = max(1, len(blocks))
    logits = uses * (output.outputs * widths.wide + widths.operand_row(output))
    wide = widths.norm(norms) + inputs + logits
    narrow = norms * widths.stream + logits
    return ActivationBytes(wide, narrow, wide)
