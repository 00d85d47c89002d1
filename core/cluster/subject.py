"""A recipe that is ready to be laid out: its model on the meta device, and what was counted for one layout already."""

from dataclasses import dataclass, field
from typing import Any

from core.analysis.budget import plan_of
from core.analysis.describe import RecordingPrecision
from core.analysis.exchange import Choice, choices
from core.analysis.memory import Stage, StageCounter, units_of
from core.analysis.parallel_layout import ParallelLayout, stage_sizes
from core.analysis.size import size_of
from core.assemble import build, make
from core.cluster.plan import Plan
from core.cluster.schedules import make_plan
from core.cluster.work import Work, stage_works
from core.contracts.errors import UserError
from core.model.language_model import LanguageModel
from core.model.parameters import named_parameters
from core.recipe.compose import Recipe
from core.recipe.plan import TrainingPlan


@dataclass(frozen=True)
class Subject:
    """A recipe that is ready to be laid out.

    Args:
        recipe: what is trained.
        model: the recipe's, on the meta device.
        precision: the recipe's, which has recorded the products.
        steps: the recipe's steps.
        moment_bytes: bytes of the optimizer's states for one weight.
        flops: training FLOPs per token by Megatron-LM's count.
        choices: how the tokens of each layer choose their experts.
        cached: what was counted for one number of stages, for the next layout with as many.
    """

    recipe: Recipe
    model: LanguageModel
    precision: RecordingPrecision
    steps: TrainingPlan
    moment_bytes: float
    flops: float
    choices: dict[str, Choice]
    cached: dict[Any, Any] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """The number of blocks, those of multi-token modules included."""
        if "layers" not in self.cached:
            self.cached["layers"] = len(units_of(self.model))
        found: int = self.cached["layers"]
        return found

    def works(self, stages: int) -> list[Work]:
        """The work of every stage."""
        if stages not in self.cached:
            sizes = stage_sizes(self.layers, stages)
            made = self.precision.made
            self.cached[stages] = stage_works(self.model, made, self.precision, sizes)
        found: list[Work] = self.cached[stages]
        return found

    def plan(self, schedule: str, ranks: int, micro_batches: int, chunks: int) -> Plan:
        """The plan of a schedule."""
        key = (schedule, ranks, micro_batches, chunks)
        if key not in self.cached:
            self.cached[key] = make_plan(*key)
        found: Plan = self.cached[key]
        return found

    def stages(self, axes: ParallelLayout, copies: int) -> list[Stage]:
        """The states and activations of every stage, as `core.analysis.memory` counts them."""
        if (axes, copies) not in self.cached:
            made = self.precision.made
            counter = StageCounter(self.recipe, self.model, made, self.precision, axes, copies)
            self.cached[axes, copies] = counter.stages(units_of(self.model))
        found: list[Stage] = self.cached[axes, copies]
        return found


def subject_of(recipe: Recipe) -> Subject:
    """Builds a recipe's model on the meta device, once for any number of predictions."""
    precision = RecordingPrecision(make(recipe.precision))
    try:
        model = build(recipe, device="meta", precision=precision)
    except UserError as error:
        raise UserError(f"{recipe.source}: {error}") from error
    optimizer = recipe.optimizer.component(recipe.optimizer.config)
    states = 0
    weights = 0
    for named in named_parameters(model):
        if named.parameter.requires_grad:
            states += optimizer.state_bytes_of(named)
            weights += named.parameter.numel()
    return Subject(
        recipe,
        model,
        precision,
        plan_of(recipe, model),
        states / max(1, weights),
        size_of(model).flops_per_token_megatron,
        dict(choices(model)),
    )
