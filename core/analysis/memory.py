"""Memory of one GPU under a layout: weights, gradients, optimizer states and activations of every pipeline stage.

The scheme is that of the DeepSeek-V3 report (section 3.2): ZeRO-1, which spreads only optimizer states over data ranks.

- weights: a working copy in the format of each product (bf16: 2 bytes), on every GPU of the stage;
- gradients: in the format in which a weight is kept (fp32: 4 bytes), likewise;
- optimizer: what the optimizer keeps for a weight, and the weight itself where the working copy is another format
  (the fp32 master weight), over the ranks that hold the same weight: `data` of them, `data / expert` for
  routed experts, of which a GPU holds an `expert`-th part.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from core.analysis.activations import (
    POLICIES,
    ActivationBytes,
    Widths,
    block_activations,
    head_activations,
)
from core.analysis.parallel_layout import (
    ParallelLayout,
    PipelineSchedule,
    Traffic,
    check,
    stage_sizes,
    traffic,
)
from core.analysis.products import MatrixProduct, Products
from core.contracts.precision import Precision
from core.model.block import Block
from core.model.language_model import LanguageModel
from core.model.parameters import named_parameters
from core.recipe.compose import Recipe
from core.recipe.plan import TrainingPlan

CONVENTION = (
    "per GPU and pipeline stage, in bytes; ZeRO-1: weights = working copies in the products' formats, gradients in the "
    "weights' own format, optimizer = its states and the master weights, spread over the data ranks; routed experts "
    "spread over the expert ranks; even load; activations: recompute none, selective (RMSNorm and the up-projections "
    "of latent attention: DeepSeek-V3 report, 3.2.3) or full (every block keeps its input); without buffers of "
    "communication, workspaces and the allocator's loss"
)


@dataclass
class StateBytes:
    """Parameters and bytes on one GPU that do not depend on the batch.

    Args:
        parameters: their number.
        weights, gradients, optimizer: their bytes.
    """

    parameters: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0

    def __add__(self, other: "StateBytes") -> "StateBytes":
        return StateBytes(
            self.parameters + other.parameters,
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
        )


@dataclass
class Stage:
    """One pipeline stage's share of the model.

    Args:
        blocks: names of its blocks, multi-token modules included.
        states: those of one GPU.
        activations: bytes per token of one micro-batch.
    """

    blocks: list[str] = field(default_factory=list)
    states: StateBytes = field(default_factory=StateBytes)
    activations: ActivationBytes = field(default_factory=ActivationBytes)


def per_gpu(
    recipe: Recipe,
    model: LanguageModel,
    plan: TrainingPlan,
    products: Products,
    precision: Precision,
    layout: ParallelLayout,
    *,
    sequences: int | None = None,
    schedule: PipelineSchedule = "1f1b",
) -> dict[str, Any]:
    """The memory of a GPU of each stage, as plain containers, and the fullest stage.

    Args:
        recipe: its batch and its optimizer decide.
        model: the recipe's, on the meta device.
        plan: the recipe's steps.
        products: the model's matrix-product layers.
        precision: the recipe's.
        layout: sizes of the axes.
        sequences: how many a GPU takes at once (see `layout.traffic`).
        schedule: "1f1b": stage s of P keeps P - s micro-batches; "dualpipe": a GPU holds stages s and P - 1 - s, and
            keeps P - s and s + 1 micro-batches of them (report, table 2: twice the parameters, P + 1 activations);
            every weight then has two copies in a pipeline, over whose ranks the optimizer is spread too.

    Raises:
        UserError: the layout is impossible for this model.
    """
    units = units_of(model)
    experts = [layer.experts for layer in model.expert_layers().values()]
    check(layout, experts=experts, layers=len(units), sequences=recipe.batch.sequences)
    passing = traffic(recipe, plan, layout, sequences, schedule)
    copies = 2 if _is_dualpipe(layout, passing) else 1
    stages = StageCounter(recipe, model, products, precision, layout, copies).stages(units)
    tokens = passing.sequences * recipe.data.sequence_length
    rows = [_row(index, stages, layout, passing, tokens) for index in range(layout.pipeline)]
    largest = {}
    largest_bytes = {}
    for policy in POLICIES:
        totals = [row["total"][policy] for row in rows]
        largest_bytes[policy] = max(totals)
        largest[policy] = totals.index(max(totals))
    return {
        "axes": asdict(layout),
        "gpus": layout.gpus,
        "schedule": schedule if layout.pipeline > 1 else "none",
        "microbatch_sequences": passing.sequences,
        "microbatches_per_step": passing.batches,
        "stages": rows,
        "largest": largest,
        "largest_bytes": largest_bytes,
        "convention": CONVENTION,
    }


def _is_dualpipe(layout: ParallelLayout, passing: Traffic) -> bool:
    """Whether every GPU holds two stages."""
    return passing.schedule == "dualpipe" and layout.pipeline > 1


def units_of(model: LanguageModel) -> list[tuple[str, Block]]:
    """Every block by name, those of the heads last."""
    return [(name, part) for name, part in model.named_modules() if isinstance(part, Block)]


class StageCounter:
    """Counts the bytes of one model's stages under one layout.

    Args:
        recipe, model, products, precision, layout: the arguments of `per_gpu`.
        copies: number of copies of every weight in a pipeline.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: LanguageModel,
        products: Products,
        precision: Precision,
        layout: ParallelLayout,
        copies: int,
    ) -> None:
        self.copies = copies
        optimizer = recipe.optimizer.component(recipe.optimizer.config)
        self.state_bytes: dict[Tensor, int] = {}
        for named in named_parameters(model):
            trained = named.parameter.requires_grad
            self.state_bytes[named.parameter] = optimizer.state_bytes_of(named) if trained else 0
        self.model = model
        self.products = products
        self.precision = precision
        self.layout = layout
        self.widths = Widths(precision)
        self.working_bytes: dict[nn.Parameter, int] = {}
        self.grouped: set[nn.Parameter] = set()
        for layer, product in products.items():
            for parameter in layer.parameters():
                self.working_bytes[parameter] = self.widths.operand(product)
                if product.groups:
                    self.grouped.add(parameter)
        self.working_bytes[model.embedding.weight] = self.widths.stream

    def stages(self, units: list[tuple[str, Block]]) -> list[Stage]:
        """The stages in order: the embedding is in the first; the final norm, the output and the heads in the last."""
        rest = iter(units)
        stages = []
        for size in stage_sizes(len(units), self.layout.pipeline):
            stage = Stage()
            for _ in range(size):
                name, block = next(rest)
                stage.blocks.append(name)
                stage.states += self.states(block)
                stage.activations += block_activations(block, self.products, self.widths)
            stages.append(stage)
        model = self.model
        stages[0].states += self.states(model.embedding)
        last = stages[-1]
        last.states += self.states(model.norm) + self.states(model.output)
        norm = self.widths.norm(model.norm.dim)
        last.activations += ActivationBytes(norm, norm, norm)
        vocabulary, dim = model.embedding.weight.shape
        output = self.products.get(model.output, MatrixProduct("head", dim, vocabulary))
        inside = {parameter for _, block in units for parameter in block.parameters()}
        for _, head in model.loss_heads():
            last.states += self.states(head, without=inside)
            last.activations += head_activations(head, output, self.products, self.widths)
        return stages

    def states(self, module: nn.Module, without: Collection[nn.Parameter] = ()) -> StateBytes:
        """The states of a part of the model on one GPU; what is spread unevenly is rounded up."""
        total = StateBytes()
        for parameter in module.parameters():
            if parameter not in without:
                total += self._parameter_states(parameter)
        return total

    def _parameter_states(self, parameter: nn.Parameter) -> StateBytes:
        """The states of one parameter by ZeRO-1 (Rajbhandari et al., arXiv 1910.02054, section 5.1).

        A working copy in another format than the parameter's leaves the parameter itself to the optimizer, as its
        master weight. Master weight and moments are spread over the ranks that hold the same weight.
        """
        layout = self.layout
        own_bytes = parameter.element_size()
        working_bytes = self.working_bytes.get(parameter, own_bytes)
        held = parameter.numel()
        ranks = layout.data
        if parameter in self.grouped:
            held = held // layout.expert
            ranks = layout.data // layout.expert
        master = held * own_bytes if working_bytes != own_bytes else 0
        moments = self.state_bytes[parameter] * held // parameter.numel()
        optimizer = -(-(master + moments) // (ranks * self.copies))  # rounded up
        gradients = held * own_bytes if parameter.requires_grad else 0
        return StateBytes(held, held * working_bytes, gradients, optimizer)


def _row(
    index: int, stages: list[Stage], layout: ParallelLayout, passing: Traffic, tokens: int
) -> dict[str, Any]:
    """The memory of a GPU of one stage.

    Args:
        index: the stage.
        stages: all of them.
        layout: sizes of the axes.
        passing: what passes through the pipeline in a step.
        tokens: tokens of one micro-batch.
    """
    waiting = {index: passing.waiting(index, layout.pipeline)}
    if _is_dualpipe(layout, passing):
        mirror = layout.pipeline - 1 - index
        waiting = {index: layout.pipeline - index, mirror: index + 1}
    held = [stages[stage] for stage in waiting]
    states = sum((stage.states for stage in held), start=StateBytes())
    fixed = states.weights + states.gradients + states.optimizer
    activations = {}
    total = {}
    for policy in POLICIES:
        kept = sum(stages[s].activations.kept(policy) * count for s, count in waiting.items())
        recomputed = max(stage.activations.recomputed(policy) for stage in held)
        activations[policy] = tokens * (kept + recomputed)
        total[policy] = fixed + activations[policy]
    return {
        "stage": index,
        "blocks": [name for stage in held for name in stage.blocks],
        "waiting": sum(waiting.values()),
        **asdict(states),
        "activations": activations,
        "total": total,
    }
