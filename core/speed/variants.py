"""The peer of one measurement: its implementations that run here, and the comparison with the best of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.model.language_model import LanguageModel
from core.speed import peer
from core.speed.peer import NoPeerError, PeerFolder
from core.speed.sides import Sides, memory, start
from core.speed.task import COMPILED, OURS, Task
from core.speed.turns import Turns

FAR = 3.0
"""A variant that takes this many times the fastest one's time is not timed any further."""


@dataclass
class Variants:
    """What the peer offers for one measurement.

    Args:
        why_not: a sentence about the missing peer, or about the difference that forbids a ratio.
        folder: the model as transformers reads it.
        timed: the variants that are timed, by name.
        left_out: why each other one is not, by name.
        screened: the measurements of each variant in a process of its own.
    """

    why_not: str | None = None
    folder: PeerFolder | None = None
    timed: dict[str, Callable[[], Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    screened: dict[str, dict[str, Any]] = field(default_factory=dict)


def exported(task: Task, model: LanguageModel, folder: Path) -> Variants:
    """Writes our weights for transformers, if it takes part and has such a model."""
    if not task.with_peer:
        return Variants("--no-peer")
    try:
        peer.check_expressible(task.measured.recipe)
    except NoPeerError as error:
        return Variants(str(error))
    return Variants(None, peer.export(task.measured.recipe, model, folder))


def choose(
    task: Task,
    variants: Variants,
    names: list[str],
    side: Any,
    sides: Sides,
    own: dict[str, Any],
) -> None:
    """Finds the variants that run here, and are not far slower than the fastest one.

    Args:
        task: says whether those that compile are tried.
        variants: receives them.
        names: all that transformers offers.
        side: the model in transformers, with `use(variant)` and `run()`.
        sides: processes in which each is tried.
        own: our side's measurements.
    """
    if not task.compiles:
        names = [name for name in names if not name.endswith(COMPILED)]
    times = {}
    variants.screened = sides.screened(names, own)
    for name, row in variants.screened.items():
        if "error" in row:
            variants.left_out[name] = row["error"]
        else:
            times[name] = row["seconds"]
    for name, spent in times.items():
        times_slower = spent / min(times.values())
        if times_slower <= FAR:
            variants.timed[name] = _run_with(side, name)
        else:
            variants.left_out[name] = f"{times_slower:.1f} times slower than the best one"


def _run_with(side: Any, variant: str) -> Callable[[], Any]:
    """The work of the peer in one of its variants."""

    def run() -> Any:
        side.use(variant)
        return side.run()

    return run


def _compile_seconds(name: str, row: dict[str, Any]) -> float | None:
    """How much longer the first run took than the others, where it compiles."""
    if not name.endswith(COMPILED):
        return None
    longer: float = row["first_seconds"] - row["seconds"]
    return max(0.0, longer)


def measured_apart(
    row: dict[str, Any], variants: Variants, sides: Sides, own: dict[str, Any]
) -> dict[str, Any]:
    """Memory and start of both sides, from processes of their own.

    The start is that of the peer's best variant. Memory is that of its best one that does not compile, because a
    compiler's own memory is not the model's.

    Args:
        row: what `against_peer` returned.
        variants: what was timed.
        sides: starts the processes.
        own: our side's measurements.
    """
    plain = [name for name in variants.timed if not name.endswith(COMPILED)]
    other = None
    if plain:
        best = max(plain, key=lambda name: row["variants"][name]["tokens_per_second"])
        other = {"variant": best, **sides.theirs(best)}
    started = variants.screened.get(row["peer"]["best"]) if row["peer"] else None
    return {**memory(own, other), **start(own, started)}


def against_peer(turns: Turns, variants: Variants, tokens: int) -> dict[str, Any]:
    """The comparison with the best of the peer's variants; ratios are null without one.

    Args:
        turns: all measurements.
        variants: what was timed.
        tokens: how many one run reads or writes.
    """
    row: dict[str, Any] = {"ratio": None, "interval": None, "peer": None}
    found: dict[str, Any] = {}
    for name in variants.timed:
        ratio = turns.ratio(OURS, name)
        found[name] = {
            "tokens_per_second": tokens / turns.median(name),
            "ratio": ratio.median,
            "interval": ratio.interval,
            "compile_seconds": _compile_seconds(name, variants.screened[name]),
        }
    if found:
        best = min(found, key=lambda name: found[name]["ratio"])
        row["ratio"] = found[best]["ratio"]
        row["interval"] = found[best]["interval"]
        row["peer"] = {"best": best, "tokens_per_second": found[best]["tokens_per_second"]}
    row["no_ratio"] = variants.why_not
    if variants.left_out and not found and variants.why_not is None:
        row["no_ratio"] = "no variant of transformers runs here: see left_out"
    row["variants"] = found
    row["left_out"] = variants.left_out
    return row
