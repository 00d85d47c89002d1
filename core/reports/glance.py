"""What a person asks first of one run: its loss, bits per byte, balance and speed, and a text that it wrote."""

from dataclasses import dataclass
from typing import Any

from core.reports.study_files import Run
from core.reports.words import LOSS, duration, number
from core.storage.documents import finite_number

LATEST = 0.05
"""The last part of training, as a fraction of its steps, over which a value of single steps is averaged."""

LONGEST_SAMPLE = 4000
"""The most characters of the sample text that are shown."""


@dataclass(frozen=True)
class Answer:
    """One answer.

    Args:
        title: what is asked.
        value: the number; a dash where it is not known.
        unit: its unit.
        under: what else there is to say, in short lines.
    """

    title: str
    value: str
    unit: str
    under: list[str]


def glance(run: Run) -> list[Answer]:
    """The answers, in the order of the questions; those that are not known yet say so."""
    return [_loss(run), _bits(run), _balance(run), _speed(run)]


def sample_of(run: Run) -> str:
    """The text that the model wrote at the end of its training, without what is too long; "" if there is none."""
    text = run.sample.strip()
    if len(text) > LONGEST_SAMPLE:
        return f"{text[:LONGEST_SAMPLE]}…"
    return text


def _loss(run: Run) -> Answer:
    """The validation loss, and the mean training loss of the last steps."""
    value, when = _measured(run, "val_loss")
    under = [when]
    training = _recent(run, LOSS)
    if training is not None:
        under.append(f"training {number(training, 3)}, mean of the last {LATEST:.0%} of the steps")
    return Answer("Validation loss", number(value, 3), "nats per token", _lines(under))


def _bits(run: Run) -> Answer:
    value, when = _measured(run, "val_bits_per_byte")
    return Answer("Bits per byte", number(value, 3), "of the validation text", _lines([when]))


def _balance(run: Run) -> Answer:
    """MaxVio over the held-out split; the mean of the last steps until there is one."""
    value = run.number("max_vio_global")
    under = ["0 is an even load of all experts"]
    recent = run.number("max_vio_batch")
    if recent is None:
        recent = _recent(run, "load/max_vio_batch")
    if value is None and recent is not None:
        return Answer("Balance", number(recent, 2), "MaxVio of the last steps", under)
    if value is None:
        return Answer(
            "Balance", number(None), "MaxVio", ["no expert layers, or no load was logged"]
        )
    if recent is not None:
        under.append(f"{number(recent, 2)} in the last steps")
    dropped = run.number("dropped_fraction")
    if dropped:
        under.append(f"{dropped:.2%} of the assignments dropped")
    return Answer("Balance", number(value, 2), "MaxVio over the validation text", under)


def _speed(run: Run) -> Answer:
    """Tokens per second of the whole run, or of its last steps so far."""
    value = run.number("tokens_per_second")
    if value is None:
        value = _recent(run, "tokens_per_second")
    under = []
    mfu = run.number("mfu")
    if mfu is not None:
        under.append(f"MFU {mfu:.1%}")
    tokens = run.number("tokens")
    seconds = run.number("train_seconds")
    if tokens is not None and seconds is not None:
        under.append(f"{number(tokens, 0)} tokens in {duration(seconds)} of training")
    return Answer("Speed", number(value, 0), "tokens per second", under)


def _measured(run: Run, key: str) -> tuple[float | None, str]:
    """A value of the summary, or else the last one that was logged, with the words that say which."""
    value = run.number(key)
    if value is not None:
        return value, ""
    if not run.has(key):
        return None, "not validated yet"
    rows = run.metrics[["step", key]].dropna()
    return float(rows[key].iloc[-1]), f"so far, at step {rows['step'].iloc[-1]:,.0f}"


def _recent(run: Run, column: str) -> float | None:
    """The mean of a column of `metrics.csv` over the last part of training; None without a value."""
    if not run.has(column):
        return None
    values: Any = run.metrics[column].dropna()
    count = max(1, round(LATEST * len(values)))
    return finite_number(float(values.iloc[-count:].mean()))


def _lines(lines: list[str]) -> list[str]:
    return [line for line in lines if line]
