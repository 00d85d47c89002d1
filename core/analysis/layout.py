"""How a model would be laid out over GPUs: the axes, what each pipeline stage holds, how many micro-batches wait.

As DeepSeek-V3's report does (section 3.2): `data` ranks read different sequences, `expert` consecutive ones of them
share the routed experts, `pipeline` stages share the layers; data x pipeline GPUs in all, and no tensor parallelism.
"""

from dataclasses import dataclass
from typing import Literal

from core.contracts.errors import UserError, nearest
from core.recipe.compose import Recipe
from core.recipe.plan import Plan

AXES = ("data", "expert", "pipeline")
Schedule = Literal["1f1b", "dualpipe"]


@dataclass(frozen=True)
class Layout:
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
        """The experts' ranks are among the data ranks."""
        return self.data * self.pipeline


def parse(text: str) -> Layout:
    """`data=128,expert=64,pipeline=16`; an axis that is left out has size 1.

    Raises:
        UserError: an unknown or repeated axis, or a size that is no whole number of at least 1.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, number = (word.strip() for word in part.partition("="))
        if not equals or not axis:
            raise UserError(f"--layout: {part.strip()!r} is no AXIS=SIZE; write {AXES[0]}=8,{AXES[1]}=4,{AXES[2]}=2")
        if axis not in AXES:
            raise UserError(f"--layout: {axis!r} is no axis; {nearest(axis, AXES)}")
        if axis in sizes:
            raise UserError(f"--layout: {axis} is given twice")
        if not (number.isascii() and number.isdigit() and int(number)):
            raise UserError(f"--layout: {axis} = {number!r} must be a whole number of at least 1")
        sizes[axis] = int(number)
    return Layout(**sizes)


def check(layout: Layout, *, experts: list[int], layers: int, sequences: int) -> None:
    """Refuse what no cluster could do with this model.

    Args:
        experts: routed experts of every layer that has any.
        layers: blocks, multi-token modules included.
        sequences: of a micro-batch over all data ranks, `batch.sequences`.

    Raises:
        UserError: sizes that do not divide each other or the model.
    """
    if layout.expert > 1 and not experts:
        raise UserError(f"--layout: expert = {layout.expert} must be 1: the model has no routed experts")
    for count in experts:
        if count % layout.expert:
            raise UserError(f"--layout: expert = {layout.expert} must divide the {count} routed experts of a layer")
    if layout.data % layout.expert:
        why = "one copy of the experts lies on that many data ranks"
        raise UserError(f"--layout: expert = {layout.expert} must divide data = {layout.data}: {why}")
    if layout.pipeline > layers:
        told = f"must be at most {layers}, the layers with multi-token modules"
        raise UserError(f"--layout: pipeline = {layout.pipeline} {told}: every stage needs one")
    if sequences % layout.data:
        raise UserError(f"--layout: data = {layout.data} must divide batch.sequences = {sequences}")


def stage_sizes(layers: int, stages: int) -> list[int]:
    """How many consecutive layers each stage holds: as even as can be, the shorter ones last, first, last but one, ...

    The ends hold the output and the embedding beside their layers. DeepSeek-V3's 61 blocks and multi-token module
    on 16 stages: 3, fourteen times 4, 3. The report does not print its own cut.
    """
    longer = layers % stages
    sizes = [layers // stages + 1] * stages if longer else [layers // stages] * stages
    for index in range(stages - longer if longer else 0):
        sizes[stages - 1 - index // 2 if index % 2 == 0 else index // 2] -= 1
    return sizes


@dataclass(frozen=True)
class Traffic:
    """What passes through a pipeline in one step.

    Args:
        sequences: that one GPU takes at once, a micro-batch of the pipeline.
        batches: such micro-batches in a step, at the end of a batch ramp.
        schedule: the order of forwards and backwards.
    """

    sequences: int
    batches: int
    schedule: Schedule

    def waiting(self, stage: int, stages: int) -> int:
        """Micro-batches whose activations a stage keeps at most: those behind it, itself included (1F1B)."""
        return min(stages - stage, self.batches)


def traffic(recipe: Recipe, plan: Plan, layout: Layout, sequences: int | None, schedule: Schedule) -> Traffic:
    """What one GPU reads in a step.

    Args:
        sequences: that a GPU takes at once; None: 1 in a pipeline, else its share of the recipe's micro-batch.

    Raises:
        UserError: `sequences` does not divide what a GPU reads, or a schedule that the stages do not allow.
    """
    share = recipe.batch.sequences // layout.data
    taken = (share if layout.pipeline == 1 else 1) if sequences is None else sequences
    if taken < 1 or share % taken:
        told = (
            f"must divide {share}, the sequences of a micro-batch (batch.sequences) on each of {layout.data} data ranks"
        )
        raise UserError(f"--microbatch: {taken} {told}")
    if schedule == "dualpipe" and layout.pipeline % 2:
        raise UserError(f"--schedule: dualpipe needs an even number of stages, and pipeline = {layout.pipeline}")
    batches = share // taken * plan.window(plan.steps - 1).count
    if schedule == "dualpipe" and (batches % 2 or batches < 2 * layout.pipeline):
        told = f"an even number of micro-batches, at least twice the {layout.pipeline} stages"
        raise UserError(f"--schedule: dualpipe needs {told}; a step has {batches} of {taken} sequences")
    return Traffic(taken, batches, schedule)
