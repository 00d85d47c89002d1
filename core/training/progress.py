"""How far a run is: one line that is redrawn on a terminal, and a line now and then everywhere else."""

import os
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from core.training.module import TrainingModule

LINE_SECONDS = 30.0
"""Seconds after which a line is written where there is no terminal."""

LINE_PARTS = 20
"""Parts of the steps, 5% each, after which a line is also written where there is no terminal."""

MIN_LINE_SECONDS = 5.0
"""Fewest seconds between two lines where there is no terminal."""

REDRAWS = 5
"""Times in a second that the line is redrawn on a terminal."""

MIN_BAR_WIDTH = 10
"""Columns of the shortest bar."""

SHOWN = (
    ("loss/total", "loss {:.3f}"),
    ("val_bits_per_byte", "val {:.3f} bits/byte"),
    ("load/max_vio_batch", "MaxVio {:.2f}"),
    ("lr", "lr {:.3g}"),
    ("tokens_per_second", "{:,.0f} tokens/s"),
)
"""The values of a line, in its order, and how each is written."""

LEFT_OUT_FIRST = ("lr", "load/max_vio_batch", "val_bits_per_byte")
"""What a line does without where it would be longer than the terminal is wide, in this order."""


class ProgressLine(L.Callback):
    """Shows step, loss, bits per byte, balance, learning rate, speed and time left on stderr, on the first rank.

    Args:
        stream: where to write; None: stderr.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream
        self.step = 0
        self.steps = 0
        self.status = ""
        self._values: dict[str, float] = {}
        self._first = 0
        self._began = 0.0
        self._read = 0.0
        self._last_line = 0.0
        self._last_part = 0
        self._written = 0
        self._live: Live | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the first line."""
        assert isinstance(pl_module, TrainingModule)
        if not trainer.is_global_zero:
            return
        stream = self.stream or sys.stderr
        self.step = pl_module.windows_done
        self._first = self.step
        self._written = self.step
        self.steps = pl_module.plan.steps
        self._began = time.monotonic()
        self._last_line = self._began
        self._last_part = self._part()
        if stream.isatty() and os.environ.get("TERM") != "dumb":
            console = Console(file=stream)
            self._live = Live(self, console=console, refresh_per_second=REDRAWS)
            self._live.start()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Takes the values of the step; writes a line if one is due."""
        assert isinstance(pl_module, TrainingModule)
        if not self.steps:
            return
        self.step = pl_module.windows_done
        now = time.monotonic()
        if now - self._read > 1 / REDRAWS or self.step == self.steps:
            self._read = now
            self._read_values(pl_module.step_values)
        self._write_line_if_due()

    def _read_values(self, step_values: dict[str, Any]) -> None:
        """Copies what is shown of a step's values; not at every step, because a GPU has to be waited for."""
        for name, _ in SHOWN:
            if name in step_values:
                self._values[name] = float(step_values[name])

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Shows how far a validation is."""
        if self.steps and trainer.state.fn == TrainerFn.FITTING:
            self.status = f"validating {batch_idx + 1}/{int(sum(trainer.num_val_batches))}"
            self._write_line_if_due()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the bits per byte of a validation from then on."""
        assert isinstance(pl_module, TrainingModule)
        self.status = ""
        bits = pl_module.validated.get("val_bits_per_byte")
        if bits is not None:
            self._values["val_bits_per_byte"] = bits

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the last line on the terminal; without one, writes it."""
        if self._live is None and self._written < self.step:
            self._write_line()
        self.stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leaves the terminal as it was."""
        self.stop()

    def stop(self) -> None:
        """Draws the last line, and shows the cursor."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The line as rich draws it: never more than the terminal's width."""
        yield Text(self.line(options.max_width), no_wrap=True, overflow="crop")

    def line(self, width: int) -> str:
        """The line for a terminal of some columns: what does not fit is left out, and a bar fills the rest."""
        end = self.status or self._time_left()
        line = self._joined((), end)
        for count in range(1, len(LEFT_OUT_FIRST) + 1):
            if len(line) > width:
                line = self._joined(LEFT_OUT_FIRST[:count], end)
        free = width - len(line) - 3
        if free < MIN_BAR_WIDTH:
            return line[:width]
        filled = free * self.step // max(self.steps, 1)
        return f"{'━' * filled}{'┄' * (free - filled)}  {line}"

    def _joined(self, left_out: Sequence[str], *end: str) -> str:
        """The step, the values that are known and not left out, and what ends the line."""
        parts = [f"step {self.step}/{self.steps}"]
        for name, form in SHOWN:
            if name in self._values and name not in left_out:
                parts.append(form.format(self._values[name]))
        return "  ".join(part for part in (*parts, *end) if part)

    def _time_left(self) -> str:
        """The time that the other steps take at the pace so far; empty while it is not known."""
        done = self.step - self._first
        if done < 1 or self.step >= self.steps:
            return ""
        seconds = (time.monotonic() - self._began) / done * (self.steps - self.step)
        return f"{duration(seconds)} left"

    def _part(self) -> int:
        """How many twentieths of the steps are done."""
        return LINE_PARTS * self.step // max(self.steps, 1)

    def _write_line_if_due(self) -> None:
        """Writes a line after some seconds or some part of the steps, where there is no terminal."""
        if self._live is not None:
            return
        now = time.monotonic()
        passed = now - self._last_line
        next_part = self._part() > self._last_part and passed >= MIN_LINE_SECONDS
        if passed < LINE_SECONDS and not next_part:
            return
        self._write_line()

    def _write_line(self) -> None:
        """Writes a line."""
        self._last_line = time.monotonic()
        self._last_part = self._part()
        self._written = self.step
        left = self._time_left()
        if left:
            left = f"about {left}"
        line = self._joined((), left, self.status)
        print(line, file=self.stream or sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time in one unit: `40 s`, `3 min`, `2.1 h`, `3 d`."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes / 60:.1f} h"
    return f"{round(minutes / 60 / 24)} d"
