"""What a run prints while it trains: one line on a terminal, a line now and then elsewhere, and no greetings."""

import io
import logging
import os
import pty
import re
import signal
import struct
import sys
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import pytest
from lab import Lab, forked, run_command_here
from tiers import first_by_default

from core.training import progress
from core.training.progress import ProgressLine, duration

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
UP = re.compile(r"\x1b\[[0-9]*A")
BAR = "trainer.enable_progress_bar=true"
DOCUMENTED = re.compile(
    r"step \d+/12  loss \d+\.\d+(  val \d\.\d{3} bits/byte)?(  MaxVio \d+\.\d\d)?  lr 0\.003(  [\d,]+ tokens/s)?"
    r"(  about \d+ (s|min) left)?(  validating \d+/\d+)?"
)


def on_terminal(lab: Lab, run: Path, columns: int) -> str:
    """What a run prints on a terminal of some columns."""
    pid, terminal = pty.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(120)
            os.environ["TERM"] = "xterm"
            for name in ("COLUMNS", "LINES"):  # they would count for more than the terminal
                os.environ.pop(name, None)
            ioctl(0, TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            run_command_here("fit", lab.file, BAR, "loggers=[]", "--out", run)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)
    printed = b""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:
            break
        if not chunk:
            break
        printed += chunk
    os.close(terminal)
    os.waitpid(pid, 0)
    return printed.decode()


@pytest.mark.parametrize("columns", first_by_default([80, 120]))
def test_on_a_terminal_the_run_is_one_line(lab: Lab, tmp_path: Path, columns: int) -> None:
    printed = on_terminal(lab, tmp_path / "run", columns)
    frames = [ESCAPES.sub("", frame) for frame in re.split(r"[\r\n]+", printed)]
    drawn = [frame.rstrip() for frame in frames if "step " in frame and "/12" in frame]
    assert drawn, printed
    assert max(map(len, drawn)) <= columns
    assert not UP.search(printed), "a frame had several lines"
    last = drawn[-1]
    assert "step 12/12" in last
    assert "loss " in last
    assert re.search(r"val \d\.\d{3} bits/byte", last)
    assert "lr 0.003" in last or columns < 100
    assert " tokens/s" in last
    assert "Epoch" not in printed
    assert "..." not in last
    assert "…" not in last
    assert "GPU available" not in printed


def test_the_longest_line_fits_80_columns() -> None:
    line = ProgressLine(io.StringIO())
    line.step, line.steps, line._began = 123_456, 1_000_000, -4e4
    line._values = {"loss/total": 10.123, "lr": 0.000221, "tokens_per_second": 1_234_567.0}
    line._values |= {"load/max_vio_batch": 12.345, "val_bits_per_byte": 1.0}
    shown = line.line(80)
    assert len(shown) <= 80
    assert "1,234,567 tokens/s" in shown
    assert shown.endswith("left")


def test_a_narrow_line_leaves_out_the_learning_rate_then_the_balance_then_the_bits() -> None:
    line = ProgressLine(io.StringIO())
    line.step, line.steps = 9, 9
    line._values = {"loss/total": 3.21, "load/max_vio_batch": 0.4, "val_bits_per_byte": 2.5}
    line._values |= {"lr": 0.003, "tokens_per_second": 1234.0}
    parts = ["step 9/9", "loss 3.210", "val 2.500 bits/byte", "MaxVio 0.40", "lr 0.003"]
    parts.append("1,234 tokens/s")
    for left_out in (None, 4, 3, 2):
        if left_out is not None:
            del parts[left_out]
        whole = "  ".join(parts)
        assert line.line(len(whole)) == whole
    assert line.line(len(whole) - 1) == whole[:-1]
    assert line.line(200).endswith("lr 0.003  1,234 tokens/s")


@pytest.mark.full
def test_without_a_terminal_a_line_is_written_every_30_seconds_or_5_percent(
    lab: Lab, tmp_path: Path
) -> None:
    def work() -> None:
        progress.MIN_LINE_SECONDS = 0.0
        run_command_here("fit", lab.file, BAR, "--out", tmp_path / "run")

    result = forked(work)
    lines = [line for line in result.err.splitlines() if line.startswith("step ")]
    assert len(lines) >= 11
    assert all(DOCUMENTED.fullmatch(line) for line in lines), lines
    assert "step " not in result.out


def test_a_quiet_minute_ends_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    line = ProgressLine(stream)
    line.steps, line._began, line._last_line = 10_000, 1000.0, 1000.0
    for _ in range(60):
        now[0] += 1.0
        line.step += 1
        line._write_line_if_due()
    assert stream.getvalue().splitlines() == [
        "step 30/10000  about 2.8 h left",
        "step 60/10000  about 2.8 h left",
    ]


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [(2.0, list(range(5, 101, 5))), (0.5, list(range(10, 101, 10)))],
    ids=["5% take 10 s", "5% take 2.5 s"],
)
def test_a_line_is_written_after_5_percent_of_the_steps_and_5_seconds(
    monkeypatch: pytest.MonkeyPatch, seconds: float, steps: list[int]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    line = ProgressLine(stream)
    line.steps, line._began, line._last_line = 100, 1000.0, 1000.0
    line._values = {"loss/total": 3.21, "lr": 0.003, "tokens_per_second": 1234.0}
    for _ in range(100):
        now[0] += seconds
        line.step += 1
        line._write_line_if_due()
    lines = stream.getvalue().splitlines()
    documented = re.compile(DOCUMENTED.pattern.replace("/12", "/100"))
    assert all(documented.fullmatch(line) for line in lines), lines
    written = [int(line.split("/")[0].removeprefix("step ")) for line in lines]
    assert written == steps


@pytest.mark.full
def test_a_recipe_can_ask_for_silence(lab: Lab, tmp_path: Path) -> None:
    one = ("loggers=[]", "budget.steps=1")
    result = lab.command("fit", lab.file, *one, "--out", tmp_path / "run")
    text, folder = result.err.splitlines()
    assert text.startswith("text: ")
    assert folder == f"run folder: {tmp_path / 'run'}"


@pytest.mark.full
def test_the_report_of_the_profiler_is_printed(lab: Lab, tmp_path: Path) -> None:
    def work() -> None:
        # Whether Lightning has a handler depends on when it was imported, and pytest takes what is logged.
        own = logging.getLogger("lightning.pytorch.profilers")
        own.addHandler(logging.StreamHandler(sys.stderr))
        profiler = ("trainer.profiler=simple", "budget.steps=1")
        run_command_here("fit", lab.file, *profiler, "--out", tmp_path / "run")

    result = forked(work)
    assert "FIT Profiler Report" in result.err
    assert "run_training_batch" in result.err
    assert "GPU available" not in result.err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (59, "59 s"), (180, "3 min"), (7500, "2.1 h"), (273600, "3 d")],
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
