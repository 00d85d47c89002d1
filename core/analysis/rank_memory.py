"""Memory of one rank under the recipe's own strategy: what it owns, what it gathers, and its activations.

Under `fsdp` and `expert_parallel` a rank owns an equal part of every weight, gradient and optimizer state. On top it
holds, whole, the weights that are in use and the gradients that have not been added up over the ranks yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.analysis.activations import (
    ActivationBytes,
    Widths,
    block_activations,
    head_activations,
)
from core.analysis.products import MatrixProduct, Products
from core.contracts.precision import Precision
from core.contracts.strategy import StageLayout
from core.model.block import Block
from core.model.language_model import LanguageModel
from core.model.parameters import named_parameters
from core.recipe.compose import Recipe
from core.recipe.plan import TrainingPlan

CONVENTION = (
    "per rank, in bytes, at the end of a batch ramp; owned: weights, gradients, optimizer states and averages, "
    "divided over all ranks if the strategy divides weights; whole weights: those outside of blocks and, of divided "
    "blocks, two at a time (one runs, the next is gathered), with the experts of one rank; whole gradients: in fp32, "
    "those outside of blocks and of one block, or of all blocks where a step has several micro-batches; activations: "
    "of one micro-batch, with the recipe's recompute.blocks, even load; without buffers of communication, workspaces "
    "and the allocator's loss"
)

OF_STAGES = (
    "the parts are those of a rank of the fullest stage, stages counted from 1; its activations are of all "
    "micro-batches in flight there"
)
"""What is added to the convention for a pipeline."""

OWNED = ("weights", "gradients", "optimizer", "averages")
"""The parts that a rank owns."""


@dataclass
class _Unit:
    """Weights that are gathered together.

    Args:
        weights: bytes of the gathered weights on one rank.
        gradients: bytes of their whole gradients on one rank.
    """

    weights: int = 0
    gradients: int = 0


def per_rank(
    recipe: Recipe,
    model: LanguageModel,
    plan: TrainingPlan,
    products: Products,
    precision: Precision,
) -> dict[str, Any] | None:
    """The memory of one rank, as plain containers; None where one rank trains.

    Args:
        recipe: its strategy, its batch and its optimizer decide.
        model: the recipe's, on the meta device.
        plan: the recipe's steps.
        products: the model's matrix-product layers.
        precision: the recipe's.
    """
    component, config = recipe.strategy.component, recipe.strategy.config
    ranks = component.ranks_of(config)
    if ranks == 1:
        return None
    micro_batches = plan.window(plan.steps - 1).count
    sharing: Any = getattr(
        config, "inner", recipe.strategy
    )  # how ranks with the same layers share the work
    data_ranks = component.data_ranks_of(config)
    sequences = recipe.batch.sequences // data_ranks
    counter = _RankCounter(
        recipe=recipe,
        model=model,
        products=products,
        precision=precision,
        owners=data_ranks if component.divides_weights_of(config) else 1,
        expert_ranks=(component.expert_layout_of(config) or (1, 1))[0],
        keeps_weights=not getattr(sharing.config, "reshard_after_forward", True),
        keeps_gradients=micro_batches > 1,
        tokens=sequences * recipe.data.sequence_length,
    )
    stages = component.stages_of(config, model, micro_batches)
    found = [counter.parts(stage) for stage in stages or [None]]
    totals = [sum(parts.values()) for parts in found]
    parts = found[totals.index(max(totals))]
    offloads = getattr(sharing.config, "offload", False)
    on_cpu = sum(parts[part] for part in OWNED) if offloads else 0
    memory = {
        "ranks": ranks,
        "nodes": component.nodes_of(config),
        "expert_ranks": counter.expert_ranks,
        "sequences": sequences,
        "micro_batches": micro_batches,
        **parts,
        "total": max(totals) - on_cpu,
        "on_cpu": on_cpu,
        "convention": CONVENTION,
    }
    if stages is not None:
        memory["stage"] = totals.index(max(totals)) + 1
        memory["stage_totals"] = totals
        memory["convention"] = f"{CONVENTION}; {OF_STAGES}"
    return memory


@dataclass(frozen=True, kw_only=True)
class _RankCounter:
    """Counts the memory of one rank.

    Args:
        recipe, model, products, precision: the arguments of `per_rank`.
        owners: the ranks over which every weight is divided; 1: each holds it whole.
        expert_ranks: the ranks over which experts are divided.
        keeps_weights: whether blocks stay gathered from their forward to their backward.
        keeps_gradients: whether gradients are exchanged in the last of several micro-batches only.
        tokens: those of a rank's micro-batch.
    """

    recipe: Recipe
    model: LanguageModel
    products: Products
    precision: Precision
    owners: int
    expert_ranks: int
    keeps_weights: bool
    keeps_gradients: bool
    tokens: int

    def parts(self, stage: StageLayout | None) -> dict[str, int]:
        """The bytes of each part, of a rank of a stage; None: of a rank with all layers."""
        owned = _owned(self.recipe, self.model, self.owners, stage)
        whole = _Unit()
        if self.owners > 1 or self.recipe.strategy.component.divides_weights_of(
            self.recipe.strategy.config
        ):
            gathered = _Gathered(
                self.model, self.products, self.precision, self.expert_ranks, stage
            )
            whole = gathered.whole(
                keeps_weights=self.keeps_weights, keeps_gradients=self.keeps_gradients
            )
        a_token = _activations(self.model, self.products, self.precision, stage)
        return {
            **owned,
            "whole_weights": whole.weights,
            "whole_gradients": whole.gradients,
            "activations": int(self.tokens * a_token),
        }


def _owned(
    recipe: Recipe, model: LanguageModel, owners: int, stage: StageLayout | None
) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer states and averages, divided evenly and rounded up."""
    optimizer = recipe.optimizer.component(recipe.optimizer.config)
    weights = 0
    gradients = 0
    states = 0
    averages = 0
    for named in named_parameters(model):
        if stage is not None and not stage.holds(named.name):
            continue
        parameter = named.parameter
        held = -(-parameter.numel() // owners) * parameter.element_size()
        weights += held
        if not parameter.requires_grad:
            continue
        gradients += held
        states += -(-optimizer.state_bytes_of(named) // owners)
        averages += -(-average_bytes(recipe, parameter) // owners)
    return {"weights": weights, "gradients": gradients, "optimizer": states, "averages": averages}


def average_bytes(recipe: Recipe, parameter: Tensor) -> int:
    """The bytes on the training device that the averages of a weight take which callbacks keep."""
    return sum(
        section.component(section.config).average_bytes(parameter) for section in recipe.callbacks
    )


class _Gathered:
    """Counts what is whole on one rank of a model whose weights are divided.

    Args:
        model, products, precision: the arguments of `per_rank`.
        expert_ranks: ranks over which the experts are divided; a rank gathers its own experts only.
        stage: what the rank holds; None: all layers.
    """

    def __init__(
        self,
        model: LanguageModel,
        products: Products,
        precision: Precision,
        expert_ranks: int,
        stage: StageLayout | None,
    ) -> None:
        self.model = model
        self.stage = stage
        self.share: dict[nn.Parameter, int] = {}
        self.gathered_bytes: dict[nn.Parameter, int] = {}
        for layer, product in products.items():
            for parameter in layer.parameters():
                if product.groups:
                    self.share[parameter] = expert_ranks
                if precision.compute_dtype(product.role) == torch.bfloat16:
                    self.gathered_bytes[parameter] = 2

    def whole(self, *, keeps_weights: bool, keeps_gradients: bool) -> _Unit:
        """The largest sum of what is whole at once.

        Args:
            keeps_weights: whether blocks stay gathered from their forward to their backward.
            keeps_gradients: whether gradients are exchanged in the last of several micro-batches only.
        """
        blocks = list(_blocks(self.model, self.stage))
        inside = {parameter for block in blocks for parameter in block.parameters()}
        total = _Unit()
        for name, parameter in self.model.named_parameters():
            held = self.stage is None or self.stage.holds(name)
            if held and parameter not in inside:
                total.weights += parameter.numel() * parameter.element_size()
                total.gradients += parameter.numel() * 4
        units = [self._unit(block) for block in blocks]
        weights = sorted((unit.weights for unit in units), reverse=True)
        gradients = sorted((unit.gradients for unit in units), reverse=True)
        total.weights += sum(weights if keeps_weights else weights[:2])
        total.gradients += sum(gradients if keeps_gradients else gradients[:1])
        return total

    def _unit(self, block: Block) -> _Unit:
        """The whole weights and gradients of a block on one rank."""
        unit = _Unit()
        for parameter in block.parameters():
            held = parameter.numel() // self.share.get(parameter, 1)
            width = self.gathered_bytes.get(parameter, parameter.element_size())
            unit.weights += held * width
            unit.gradients += held * 4
        return unit


def _blocks(model: LanguageModel, stage: StageLayout | None) -> Iterator[Block]:
    """The blocks that a rank holds, heads' own included."""
    for path, part in model.named_modules():
        if isinstance(part, Block) and (stage is None or stage.holds(path)):
            yield part


def _activations(
    model: LanguageModel, products: Products, precision: Precision, stage: StageLayout | None
) -> float:
    """Bytes of activations for one token of each micro-batch in flight, with the recipe's recomputation."""
    widths = Widths(precision)
    kept = 0
    again = 0
    for block in _blocks(model, stage):
        policy = "full" if block.recompute else "none"
        found = block_activations(block, products, widths)
        kept += found.kept(policy)
        again = max(again, found.recomputed(policy))
    if stage is None or stage.holds("norm"):
        norm = widths.norm(model.norm.dim)
        kept += ActivationBytes(norm, norm, norm).none
        vocabulary, dim = model.embedding.weight.shape
        output = products.get(model.output, MatrixProduct("head", dim, vocabulary))
        for _, head in model.loss_heads():
            kept += head_activations(head, output, products, widths).none
    in_flight = 1 if stage is None else stage.in_flight
    return kept * in_flight + again
