"""One run of torch's profiler on one rank, with marks for what belongs to a step."""

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from plugins.profiler.analysis import STEP

SNAPSHOT_ENTRIES = 1_000_000
"""Allocations that a memory snapshot keeps, the last ones."""


@dataclass
class Recording:
    """One run of torch's profiler, with the marks that are open in it.

    Args:
        config: the keys of the recipe's section.
        device: this rank's device.
    """

    config: Any
    device: torch.device
    _profile: Any = field(default=None, init=False)
    _open: dict[str, Any] = field(default_factory=dict, init=False)

    @property
    def on_gpu(self) -> bool:
        """Whether the model is on a GPU."""
        return self.device.type == "cuda"

    @property
    def has_snapshot(self) -> bool:
        """Whether torch keeps a history of allocations, which it does on GPUs only."""
        return bool(self.config.memory) and self.on_gpu

    def start(self) -> None:
        """Starts to record, at the beginning of a step."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes a line for each of its stages
        activities = [ProfilerActivity.CPU]
        if self.on_gpu:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self.device)
        if self.has_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES, stacks="python")
        self._profile = profile(
            activities=activities,
            record_shapes=self.config.shapes,
            profile_memory=self.config.memory,
            with_stack=self.config.stacks,
        )
        self._profile.start()
        self.begin(STEP)

    def begin(self, mark: str) -> None:
        """Begins a mark; one of that name that is open ends."""
        self.end(mark)
        self._open[mark] = record_function(mark)
        self._open[mark].__enter__()

    def end(self, mark: str) -> None:
        """Ends a mark, if it is open."""
        opened = self._open.pop(mark, None)
        if opened is not None:
            opened.__exit__(None, None, None)

    def end_step(self) -> None:
        """Ends a step when the GPU has finished it."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        self.end(STEP)

    def stop(self) -> None:
        """Stops to record, after the end of a step."""
        self._profile.stop()

    def write_trace(self, file: Path) -> None:
        """Writes the trace as JSON."""
        self._profile.export_chrome_trace(str(file))

    def write_snapshot(self, file: Path) -> None:
        """Writes the history of allocations, in the format of torch's viewer, and ends it."""
        torch.cuda.memory._dump_snapshot(str(file))
        torch.cuda.memory._record_memory_history(enabled=None)

    def discard(self) -> None:
        """Stops to record and forgets what was recorded; an error that ended the run may have stopped it before."""
        for mark in list(self._open):
            self.end(mark)
        with suppress(RuntimeError):
            self._profile.stop()
        if self.has_snapshot:
            torch.cuda.memory._record_memory_history(enabled=None)
