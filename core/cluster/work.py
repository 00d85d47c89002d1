"""The work of a model's parts for one token: FLOPs of products by kind, attention, and bytes that pass through memory.

The counts are those of `core.analysis`: products with their roles, `Costs.attention_flops`, and the activations that
a backward pass needs.
"""

from dataclasses import dataclass, field

from torch import nn

from core.analysis.activations import Widths, block_activations
from core.analysis.exchange import choices
from core.analysis.memory import units_of
from core.analysis.products import MatrixProduct, Products, products_in
from core.contracts.precision import Precision
from core.model.block import Block
from core.model.language_model import LanguageModel

SELECTIVE = ("attention.q_up", "attention.kv_up")
"""Products that selective recomputation computes again."""

KEPT_WIDE = ("head", "router", "mtp")
"""First parts of roles whose products stay in bf16, or fp32, where the others are in FP8."""


@dataclass(frozen=True)
class Product:
    """One matrix product of a layer.

    Args:
        role: what it is for.
        inputs, outputs: its widths.
        groups: experts of a grouped product; 0 for a dense one.
        top_k: times that a token goes through it.
    """

    role: str
    inputs: int
    outputs: int
    groups: int = 0
    top_k: int = 1

    @property
    def flops(self) -> float:
        """FLOPs of a forward for one token."""
        return 2.0 * self.inputs * self.outputs * self.top_k

    @property
    def weights(self) -> int:
        """Weights of the whole layer."""
        return self.inputs * self.outputs * max(1, self.groups)

    @property
    def is_router(self) -> bool:
        """Whether it is computed in fp32."""
        return self.role.startswith("router")

    @property
    def can_be_fp8(self) -> bool:
        """Whether DeepSeek-V3's training computes it in FP8 (report, 3.3.1)."""
        return not self.role.startswith(KEPT_WIDE)


@dataclass
class Work:
    """The work of a stage for one token.

    Args:
        products: its matrix products.
        attention: forward FLOPs of attention, causal.
        other: further forward FLOPs.
        bytes_none, bytes_selective: activations that are kept under these policies of recomputation.
        logits: numbers in the logits.
        expert_layers: paths of its layers with routed experts.
        dim: width of what goes from stage to stage.
    """

    products: list[Product] = field(default_factory=list)
    attention: float = 0.0
    other: float = 0.0
    bytes_none: float = 0.0
    bytes_selective: float = 0.0
    logits: int = 0
    expert_layers: list[str] = field(default_factory=list)
    dim: int = 0

    def alike(self, other: "Work") -> bool:
        """Whether another stage takes as long: the same layers, of other numbers."""
        return (
            len(self.expert_layers) == len(other.expert_layers)
            and self.products == other.products
            and self.attention == other.attention
            and self.other == other.other
            and self.bytes_none == other.bytes_none
            and self.bytes_selective == other.bytes_selective
            and self.logits == other.logits
        )


def stage_works(
    model: LanguageModel, products: Products, precision: Precision, sizes: list[int]
) -> list[Work]:
    """The work of every stage in order; the output and the heads are in the last one.

    Args:
        model: the recipe's, on the meta device.
        products: its matrix-product layers.
        precision: the recipe's.
        sizes: the number of blocks of each stage, those of multi-token modules included.
    """
    widths = Widths(precision)
    routed = {path for path, _ in choices(model)}
    units = iter(units_of(model))
    vocabulary, dim = model.embedding.weight.shape
    works = []
    for size in sizes:
        work = Work(dim=dim)
        for _ in range(size):
            name, block = next(units)
            _add_block(work, name, block, products, widths, routed)
        works.append(work)
    _add_heads(works[-1], model, products, vocabulary, dim)
    return works


def _add_block(
    work: Work,
    name: str,
    block: Block,
    products: Products,
    widths: Widths,
    routed: set[str],
) -> None:
    """Adds a block's work."""
    for _, product in products_in(block, products):
        properties = block.ffn.routing_properties
        chosen = properties.top_k if properties and product.groups else 1
        work.products.append(_product(product, chosen))
    costs = block.costs()
    work.attention += costs.attention_flops
    work.other += costs.other_flops
    kept = block_activations(block, products, widths)
    work.bytes_none += kept.none
    work.bytes_selective += kept.selective
    if name in routed:
        work.expert_layers.append(name)


def _add_heads(
    work: Work, model: LanguageModel, products: Products, vocabulary: int, dim: int
) -> None:
    """Adds the uses of the output and the projections of multi-token modules to the last stage."""
    for _, head in model.loss_heads():
        blocks = [part for part in head.modules() if isinstance(part, Block)]
        uses = max(1, len(blocks))
        work.products += [Product("head", dim, vocabulary)] * uses
        work.logits += uses * vocabulary
        inside: set[nn.Module] = {part for block in blocks for part in block.modules()}
        for part, product in products_in(head, products):
            if part not in inside:
                work.products.append(_product(product, 1))


def _product(product: MatrixProduct, top_k: int) -> Product:
    return Product(product.role, product.inputs, product.outputs, product.groups, top_k)
