"""Options of a description beyond the recipe; no torch is imported, so that an invalid option is reported at once."""

from dataclasses import dataclass

from core.analysis.parallel_layout import ParallelLayout, PipelineSchedule


@dataclass(frozen=True)
class DescribeOptions:
    """What a description should go into beyond the recipe.

    Args:
        layout: GPUs to lay the model out over; None: none.
        sequences: how many a GPU takes at once; None: as `core.analysis.parallel_layout.traffic` says.
        schedule: the pipeline's schedule.
        gpus_per_node: ranks that are one node; None: the recipe's strategy says, or 8.
        mfu: the part of the peak that training gets; None: the published one, if it fits.
        tflops: a GPU's dense peak in TFLOPS; None: an H800's, if it fits.
    """

    layout: ParallelLayout | None = None
    sequences: int | None = None
    schedule: PipelineSchedule = "1f1b"
    gpus_per_node: int | None = None
    mfu: float | None = None
    tflops: float | None = None
