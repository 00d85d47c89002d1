"""Silences the warnings and greetings of other libraries that say nothing about a run."""

import logging
import warnings

IGNORED_WARNINGS = (
    r".*LeafSpec",
    r"Checkpoint directory .* exists and is not empty",
    r"FLOPs not found for",
    r"Total length of `list` across ranks is zero",
    r"`broadcast_buffers` is deprecated",
    r"The AccumulateGrad node's stream does not match",
    r"The number of training batches .* is smaller than the logging interval",
    r"The `srun` command is available on your system but is not used",
)
"""Beginnings of warnings that say nothing about a run of moeloom.

Run folders hold several checkpoints; a small corpus has no validation split; a missing peak is null
in `summary.json`; DistributedDataParallel makes its nodes of the graph on another stream; strategies read no variables
of SLURM.
in `summary.json`; strategies read no variables of SLURM; a run may be shorter than the steps between two rows.
"""


def ignore_warnings() -> None:
    """Ignores the warnings in `IGNORED_WARNINGS`; all others are printed."""
    for beginning in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=beginning)


def silence_greetings() -> None:
    """Leaves out Lightning's greetings and tips, but not the report of `trainer.profiler`.

    To be called after Lightning has been imported, which sets the levels itself.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)
