"""What a backward pass needs of the forward, in bytes per token: by hand, from the widths of the products.

Counted is what the blocks of `core.model` and the built-in layers keep on a GPU, whose kernels store neither
attention's scores nor normalised copies in a norm (docs/describe.md has the formulas with a worked example). Not
counted: what is as narrow as a head or a choice (statistics of norms and attention, gates, indices), and the working
copies of the weights, which are counted as weights.

Three ways of recomputing:

- `none`: everything is kept;
- `selective`: RMSNorms and the up-projections of latent attention are computed again (DeepSeek-V3 report, section
  3.2.3), so that inputs of norms are kept, and neither their outputs nor queries, keys and values;
- `full`: every block keeps its input and is computed again whole (the recipe's `recompute.blocks`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from core.analysis.products import Product, Products, products_in
from core.contracts.loss_head import LossHead
from core.contracts.precision import Precision
from core.model.block import Block
from core.model.norm import RMSNorm

WAYS = ("none", "selective", "full")
"""How much is recomputed."""


@dataclass(frozen=True)
class Kept:
    """Bytes per token by what is recomputed.

    Args:
        none, selective, full: kept from the forward to the backward.
        selective_again, full_again: besides, while one block's are computed again.
    """

    none: int = 0
    selective: int = 0
    full: int = 0
    selective_again: int = 0
    full_again: int = 0

    def __add__(self, other: "Kept") -> "Kept":
        """Of both; their blocks are computed again one after the other."""
        return Kept(
            self.none + other.none,
            self.selective + other.selective,
            self.full + other.full,
            max(self.selective_again, other.selective_again),
            max(self.full_again, other.full_again),
        )

    def held(self, way: str) -> int:
        """From the forward to the backward."""
        kept: int = getattr(self, way)
        return kept

    def again(self, way: str) -> int:
        """Besides, in the backward."""
        return {"none": 0, "selective": self.selective_again, "full": self.full_again}[way]


class Widths:
    """Bytes of a number in each of its places.

    Args:
        precision: the recipe's.
    """

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.stream = precision.compute_dtype("embedding").itemsize
        self.wide = torch.promote_types(precision.compute_dtype("embedding"), torch.float32).itemsize

    def operand(self, product: Product) -> int:
        """Of a product's input, which is kept as the product reads it: in FP8 where it is FP8."""
        return self.precision.compute_dtype(product.role).itemsize

    def norm(self, width: int) -> int:
        """A norm's input, which it reads in fp32 or wider."""
        return width * self.wide


def of_block(block: Block, products: Products, widths: Widths) -> Kept:
    """A block's activations: two norms' inputs, and what its attention and its feed-forward layer keep."""
    dim = block.attention_norm.dim
    attention = _attention(dict(_by_role(block.attention, products)), widths)
    ffn = _feed_forward(block, products, widths)
    norms = 2 * widths.norm(dim)
    none = norms + attention.none + ffn.none
    selective = 2 * dim * widths.stream + attention.selective + ffn.selective
    return Kept(none, selective, dim * widths.stream, none - selective, none)


def _by_role(module: nn.Module, products: Products) -> Iterable[tuple[str, Product]]:
    return ((product.role.partition(".")[2] or product.role, product) for _, product in products_in(module, products))


def _attention(of: dict[str, Product], widths: Widths) -> Kept:
    """Latents, queries, keys, values and the heads' outputs.

    The products that read the block's normed state (`q`, `q_down`, `kv_down`, `k`, `v`) keep one copy of it. A latent
    is kept as its norm's input and as its up-projection's. Queries and keys are kept as rotated; latent attention
    builds its keys, as wide as the queries, beside the up-projection's output, which the values are a part of.
    """
    reading = [of[role] for role in ("q", "q_down", "kv_down", "k", "v") if role in of]
    normed = max((p.inputs * widths.operand(p) for p in reading), default=0)
    ups = [of[role] for role in ("q_up", "kv_up") if role in of]
    latents = sum(widths.norm(p.inputs) for p in ups)
    inputs = sum(p.inputs * widths.operand(p) for p in ups)
    made = [of[role] for role in ("q", "q_up", "k", "v", "kv_up") if role in of]
    queries = of.get("q_up", of.get("q"))
    keys = queries.outputs if queries and "kv_up" in of else 0
    core = (sum(p.outputs for p in made) + keys) * widths.stream
    output = of["output"].inputs * widths.operand(of["output"]) if "output" in of else 0
    direct = sum(of[role].outputs for role in ("q", "k", "v") if role in of)  # no up-projection makes these again
    rotated = of["kv_down"].outputs - of["kv_up"].inputs if "kv_up" in of and "kv_down" in of else 0
    selective = (sum(p.inputs for p in ups) + direct + rotated) * widths.stream + output
    return Kept(normed + latents + inputs + core + output, selective)


def _feed_forward(block: Block, products: Products, widths: Widths) -> Kept:
    """Every expert's and every dense layer's input, both halves of the first product, and what the second reads.

    A SwiGLU of width I keeps 2 I of the first product, silu(gate) and the second product's input. A routed expert
    keeps a row for each assignment, its own copy of the token and its output (for the gate's gradient) included; under
    expert parallelism a GPU receives as many assignments as it sends where the load is even. The normed state is
    kept once for the dense or shared layer, and once more in fp32 for the router where the stream is narrower.
    """
    top_k = block.ffn.traits.top_k if block.ffn.traits else 0
    dim = block.ffn_norm.dim
    kept, normed = 0, 0
    for _, product in products_in(block.ffn, products):
        rows = top_k if product.groups else 1
        operand = product.inputs * widths.operand(product)
        if product.role == "router":
            kept += 2 * product.outputs * widths.wide
            normed += dim * widths.wide if widths.stream < widths.wide else 0
        elif product.role.endswith("gate_up"):
            kept += rows * (product.outputs + product.outputs // 2) * widths.stream
            kept += rows * operand if product.groups else 0
            normed += 0 if product.groups else operand
        else:
            kept += rows * operand + (rows * product.outputs * widths.stream if product.groups else 0)
    return Kept(kept + normed, kept)


def of_head(head: LossHead, output: Product, products: Products, widths: Widths) -> Kept:
    """A loss head's own activations, its blocks apart: norms, projections, and logits for each use of the output.

    A head takes logits once, or once for each block of its own; their logarithms are kept in fp32 or wider, beside
    the state that they are made from.
    """
    blocks = [part for part in head.modules() if isinstance(part, Block)]
    inside = {inner for block in blocks for inner in block.modules()}
    own = [part for part in head.modules() if part not in inside]
    norms = [part.dim for part in own if isinstance(part, RMSNorm)]
    inputs = sum(products[part].inputs * widths.operand(products[part]) for part in own if part in products)
    uses = max(1, len(blocks))
    logits = uses * (output.outputs * widths.wide + output.inputs * widths.operand(output))
    wide = sum(map(widths.norm, norms)) + inputs + logits
    narrow = sum(norms) * widths.stream + logits
    return Kept(wide, narrow, wide)
