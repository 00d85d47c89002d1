"""Memory of one GPU under a layout: weights, gradients, optimizer states and activations of every pipeline stage.

As the DeepSeek-V3 report trains (section 3.2): ZeRO-1, so that optimizer states alone are spread over data ranks.

- weights: a working copy in the format of each product (bf16: 2 bytes), on every GPU of the stage;
- gradients: in the format in which a weight is kept (fp32: 4 bytes), likewise;
- optimizer: what the optimizer keeps for a weight, and the weight itself where the working copy is another format
  (the fp32 master weight), over the ranks that hold the same weight: `data` of them, `data / expert` for
  routed experts, of which a GPU holds an `expert`-th part.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from core.analysis.activations import WAYS, Kept, Widths, of_block, of_head
from core.analysis.layout import Layout, Schedule, Traffic, check, stage_sizes, traffic
from core.analysis.products import Product, Products
from core.contracts.precision import Precision
from core.model.block import Block
from core.model.language_model import LanguageModel
from core.recipe.compose import Recipe
from core.recipe.plan import Plan

CONVENTION = (
    "per GPU and pipeline stage, in bytes; ZeRO-1: weights = working copies in the products' formats, gradients in the "
    "weights' own format, optimizer = its states and the master weights, spread over the data ranks; routed experts "
    "spread over the expert ranks; even load; activations: recompute none, selective (RMSNorm and the up-projections "
    "of latent attention: DeepSeek-V3 report, 3.2.3) or full (every block keeps its input); without buffers of "
    "communication, workspaces and the allocator's loss"
)


@dataclass
class States:
    """Bytes that do not depend on the batch."""

    parameters: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0

    def __add__(self, other: "States") -> "States":
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return States(*(mine + theirs for mine, theirs in pairs))


@dataclass
class Stage:
    """One pipeline stage's share of the model.

    Args:
        blocks: names of its blocks, multi-token modules included.
        states: of one GPU.
        kept: activations in bytes per token of one micro-batch.
    """

    blocks: list[str] = field(default_factory=list)
    states: States = field(default_factory=States)
    kept: Kept = field(default_factory=Kept)


def per_gpu(
    recipe: Recipe,
    model: LanguageModel,
    plan: Plan,
    products: Products,
    precision: Precision,
    layout: Layout,
    *,
    sequences: int | None = None,
    schedule: Schedule = "1f1b",
) -> dict[str, Any]:
    """What a GPU of each stage holds, as plain containers, and the fullest stage.

    Args:
        model: the recipe's, on the meta device, made by `products`.
        sequences: that a GPU takes at once (see `layout.traffic`).
        schedule: "1f1b": stage s of P keeps P - s micro-batches; "dualpipe": a GPU holds stages s and P - 1 - s, and
            keeps P - s and s + 1 micro-batches of them (report, table 2: twice the parameters, P + 1 activations);
            every weight then has two copies in a pipeline, over whose ranks the optimizer is spread too.

    Raises:
        UserError: a layout that this model cannot have.
    """
    units = _units(model)
    experts = [layer.experts for layer in model.expert_layers().values()]
    check(layout, experts=experts, layers=len(units), sequences=recipe.batch.sequences)
    passing = traffic(recipe, plan, layout, sequences, schedule)
    copies = 2 if passing.schedule == "dualpipe" and layout.pipeline > 1 else 1
    share = _Counter(recipe, model, products, precision, layout, copies).stages(units)
    stages = [_row(index, share, layout, passing, recipe.data.sequence_length) for index in range(layout.pipeline)]
    return {
        "axes": asdict(layout),
        "gpus": layout.gpus,
        "schedule": schedule if layout.pipeline > 1 else "none",
        "microbatch_sequences": passing.sequences,
        "microbatches_per_step": passing.batches,
        "stages": stages,
        "largest": {way: max(stages, key=lambda row: row["total"][way])["stage"] for way in WAYS},
        "largest_bytes": {way: max(row["total"][way] for row in stages) for way in WAYS},
        "convention": CONVENTION,
    }


def _units(model: LanguageModel) -> list[tuple[str, Block]]:
    """Every block by name, those of the heads last."""
    return [(name, part) for name, part in model.named_modules() if isinstance(part, Block)]


class _Counter:
    """Counts the stages of one model under one layout, of which a pipeline holds so many copies."""

    def __init__(
        self,
        recipe: Recipe,
        model: LanguageModel,
        products: Products,
        precision: Precision,
        layout: Layout,
        copies: int,
    ) -> None:
        self.copies = copies
        self.optimizer = recipe.optimizer.component(recipe.optimizer.config)
        self.model, self.products, self.precision, self.layout = model, products, precision, layout
        self.widths = Widths(precision)
        self.formats = {
            parameter: precision.compute_dtype(product.role).itemsize
            for layer, product in products.items()
            for parameter in layer.parameters()
        }
        self.formats[model.embedding.weight] = self.widths.stream
        self.grouped = {p for layer, product in products.items() if product.groups for p in layer.parameters()}

    def stages(self, units: list[tuple[str, Block]]) -> list[Stage]:
        """In order: the embedding in the first, the final norm, the output and the heads in the last."""
        rest, found = iter(units), []
        for size in stage_sizes(len(units), self.layout.pipeline):
            stage = Stage()
            for _ in range(size):
                name, block = next(rest)
                stage.blocks.append(name)
                stage.states += self.states(block)
                stage.kept += of_block(block, self.products, self.widths)
            found.append(stage)
        model = self.model
        found[0].states += self.states(model.embedding)
        last = found[-1]
        last.states += self.states(model.norm) + self.states(model.output)
        last.kept += Kept(*[self.widths.norm(model.norm.dim)] * 3)
        vocabulary, dim = model.embedding.weight.shape
        output = self.products.get(model.output, Product("head", dim, vocabulary))
        inside = {parameter for _, block in units for parameter in block.parameters()}
        for _, head in model.loss_heads():
            last.states += self.states(head, without=inside)
            last.kept += of_head(head, output, self.products, self.widths)
        return found

    def states(self, module: nn.Module, without: Collection[nn.Parameter] = ()) -> States:
        """Of a part of the model on one GPU; what is spread unevenly is rounded up."""
        total = States()
        for parameter in module.parameters():
            if parameter not in without:
                total += self._of(parameter)
        return total

    def _of(self, parameter: nn.Parameter) -> States:
        layout, kept = self.layout, parameter.element_size()
        working = self.formats.get(parameter, kept)
        held, ranks = parameter.numel(), layout.data
        if parameter in self.grouped:
            held, ranks = held // layout.expert, layout.data // layout.expert
        master = held * kept if working != kept else 0
        moments = self.optimizer.state_bytes(parameter) * held // parameter.numel()
        return States(held, held * working, held * kept, -(-(master + moments) // (ranks * self.copies)))


def _row(index: int, stages: list[Stage], layout: Layout, passing: Traffic, length: int) -> dict[str, Any]:
    held = {index: passing.waiting(index, layout.pipeline)}
    if passing.schedule == "dualpipe" and layout.pipeline > 1:
        held = {index: layout.pipeline - index, layout.pipeline - 1 - index: index + 1}
    tokens = passing.sequences * length
    states = sum((stages[s].states for s in held), start=States())
    activations = {
        way: tokens
        * (sum(stages[s].kept.held(way) * n for s, n in held.items()) + max(stages[s].kept.again(way) for s in held))
        for way in WAYS
    }
    fixed = states.weights + states.gradients + states.optimizer
    return {
        "stage": index,
        "blocks": [name for s in held for name in stages[s].blocks],
        "waiting": sum(held.values()),
        **asdict(states),
        "activations": activations,
        "total": {way: fixed + kept for way, kept in activations.items()},
    }
