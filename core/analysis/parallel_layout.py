"""A model's layout over GPUs: the axes, the layers of each pipeline stage, and how many micro-batches wait.

As DeepSeek-V3's report does (section 3.2): `data` ranks read different sequences, `expert` consecutive ones of them
share the routed experts, `pipeline` stages share the layers; data x pipeline GPUs in all, and no tensor parallelism.
"""

from dataclasses import dataclass
from typing import Literal

from core.contracts.errors import UserError, nearest
from core.recipe.compose import Recipe
from core.recipe.plan import TrainingPlan

AXES = ("data", "expert", "pipeline")
PipelineSchedule = Literal["1f1b", "dualpipe"]


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the axes.

    Args:
        data: ranks that read different sequences.
        expert: ranks, among those, over which one copy of the routed experts is spread.
        pipeline: stages.
    """

    data: int = 1
    expert: int = 1
    pipeline: int = 1

    @property
    def gpus(self) -> int:
        """The number of GPUs; the expert ranks are among the data ranks."""
        return self.data * self.pipeline


def parse(text: str) -> ParallelLayout:
    """Parses `data=128,expert=64,pipeline=16`; an axis that is left out has size 1.

    Raises:
        UserError: an unknown or repeated axis, or a size that is not a whole number of at least 1.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, number = (word.strip() for word in part.partition("="))
        if not equals or not axis:
            example = "data=8,expert=4,pipeline=2"
            raise UserError(f"--layout: {part.strip()!r} is not AXIS=SIZE; write {example}")
        if axis not in AXES:
            raise UserError(f"--layout: unknown axis {axis!r}; {nearest(axis, AXES)}")
        if axis in sizes:
            raise UserError(f"--layout: {axis} is given twice")
        if not (number.isascii() and number.isdigit() and int(number)):
            raise UserError(f"--layout: {axis} = {number!r} must be a whole number of at least 1")
        sizes[axis] = int(number)
    return ParallelLayout(**sizes)


def check(layout: ParallelLayout, *, experts: list[int], layers: int, sequences: int) -> None:
    """Raises an error for a layout that is impossible for this model.

    Args:
        layout: sizes of the axes.
        experts: routed experts of every layer that has any.
        layers: blocks, multi-token modules included.
        sequences: sequences of a micro-batch over all data ranks, `batch.sequences`.

    Raises:
        UserError: sizes that do not divide each other or the model.
    """
    if layout.expert > 1 and not experts:
        why = "the model has no routed experts"
        raise UserError(f"--layout: expert = {layout.expert} must be 1: {why}")
    for count in experts:
        if count % layout.expert:
            allowed = f"must divide the {count} routed experts of a layer"
            raise UserError(f"--layout: expert = {layout.expert} {allowed}")
    if layout.data % layout.expert:
        allowed = f"must divide data = {layout.data}"
        why = "one copy of the experts lies on that many data ranks"
        raise UserError(f"--layout: expert = {layout.expert} {allowed}: {why}")
    if layout.pipeline > layers:
        allowed = f"must be at most {layers}, the layers with multi-token modules"
        raise UserError(f"--layout: pipeline = {layout.pipeline} {allowed}: every stage needs one")
    if sequences % layout.data:
        raise UserError(f"--layout: data = {layout.data} must divide batch.sequences = {sequences}")


def stage_sizes(layers: int, stages: int) -> list[int]:
    """The number of consecutive layers on each stage: as even as possible, shorter ones last, first, last but one, ...

    The ends hold the output and the embedding beside their layers. DeepSeek-V3's 61 blocks and multi-token module
    on 16 stages: 3, fourteen times 4, 3. The report does not print its own cut.
    """
    sizes = [-(-layers // stages)] * stages
    shorter = sum(sizes) - layers
    for index in range(shorter):
        from_the_end = index % 2 == 0
        stage = stages - 1 - index // 2 if from_the_end else index // 2
        sizes[stage] -= 1
    return sizes


@dataclass(frozen=True)
class Traffic:
    """The sequences that pass through a pipeline in one step.

    Args:
        sequences: how many a GPU takes at once, a micro-batch of the pipeline.
        batches: such micro-batches in a step, at the end of a batch ramp.
        schedule: the order of forwards and backwards.
    """

    sequences: int
    batches: int
    schedule: PipelineSchedule

    def waiting(self, stage: int, stages: int) -> int:
        """The largest number of micro-batches whose activations a stage keeps: one for each stage from it on (1F1B)."""
        return min(stages - stage, self.batches)


def traffic(
    recipe: Recipe,
    plan: TrainingPlan,
    layout: ParallelLayout,
    sequences: int | None,
    schedule: PipelineSchedule,
) -> Traffic:
    """The sequences that one GPU reads in a step.

    Args:
        recipe: its `batch.sequences` are shared out over the data ranks.
        plan: the recipe's steps; the last one decides.
        layout: sizes of the axes.
        sequences: how many a GPU takes at once; None: 1 in a pipeline, else its share of the recipe's micro-batch.
        schedule: the order of forwards and backwards.

    Raises:
        UserError: `sequences` does not divide what a GPU reads, or the stages do not allow the schedule.
    """
    share = recipe.batch.sequences // layout.data
    if sequences is None:
        sequences = share if layout.pipeline == 1 else 1
    if sequences < 1 or share % sequences:
        allowed = f"must divide {share}, the sequences of a micro-batch (batch.sequences)"
        raise UserError(f"--microbatch: {sequences} {allowed} on each of {layout.data} data ranks")
    batches = share // sequences * plan.window(plan.steps - 1).count
    if schedule == "dualpipe":
        _check_dualpipe(layout.pipeline, batches, sequences)
    return Traffic(sequences, batches, schedule)


def _check_dualpipe(stages: int, batches: int, sequences: int) -> None:
    """Raises `UserError` if DualPipe cannot run micro-batches of so many sequences on the stages."""
    if stages % 2:
        raise UserError(
            f"--schedule: dualpipe needs an even number of stages, and pipeline = {stages}"
        )
    if batches % 2 or batches < 2 * stages:
        needed = f"an even number of micro-batches, at least twice the {stages} stages"
        raise UserError(
            f"--schedule: dualpipe needs {needed}; a step has {batches} of {sequences} sequences"
        )
