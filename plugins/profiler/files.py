"""The files of a profile: traces, memory snapshots, the summary and its table, each written whole or not at all."""

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from core.contracts.errors import UserError
from plugins.profiler.analysis import PARTS, Split, peak_memory, read_events, split

SHOWN_OPERATORS = 10
"""Operators that the table lists; the summary has `KEPT_OPERATORS`."""

KEPT_OPERATORS = 50
"""Operators of each rank that the summary lists."""

NO_SNAPSHOT = "none: torch records a memory snapshot on GPUs only"
"""What the summary says in place of a snapshot's file, on CPUs."""

NOT_RECORDED = "none: memory = false"
"""What it says if allocations are not recorded."""


class Recorded(Protocol):
    """What was recorded of one rank."""

    @property
    def on_gpu(self) -> bool:
        """Whether the model is on a GPU."""

    @property
    def has_snapshot(self) -> bool:
        """Whether there is a history of allocations."""

    @property
    def config(self) -> Any:
        """The keys of the recipe's section."""

    def write_trace(self, file: Path) -> None:
        """Writes the trace as JSON."""

    def write_snapshot(self, file: Path) -> None:
        """Writes the history of allocations."""


@dataclass(frozen=True)
class RankProfile:
    """What the profile of one rank says.

    Args:
        rank: the rank.
        device: `cpu` or `cuda`.
        time: how its time was spent.
        peak_memory: bytes, or None if allocations were not recorded.
        snapshot: the name of the memory snapshot's file, or why there is none.
    """

    rank: int
    device: str
    time: Split
    peak_memory: int | None
    snapshot: str

    def share(self, nanoseconds: int) -> float:
        """A part of the profiled time as a fraction of it."""
        return nanoseconds / self.time.wall if self.time.wall else 0.0

    @property
    def covered_share(self) -> float | None:
        """The fraction of the collectives' time in which something was computed; None without collectives."""
        if not self.time.collectives:
            return None
        return self.time.covered / self.time.collectives

    def to_dict(self) -> dict[str, Any]:
        """The profile in seconds and fractions, for `summary.json`."""
        time = self.time
        operators = []
        for operator in time.operators[:KEPT_OPERATORS]:
            operators.append(
                {
                    "name": operator.name,
                    "seconds": operator.nanoseconds / 1e9,
                    "share": self.share(operator.nanoseconds),
                    "calls": operator.calls,
                }
            )
        return {
            "rank": self.rank,
            "device": self.device,
            "step_seconds": [step / 1e9 for step in time.steps],
            "wall_seconds": time.wall / 1e9,
            "seconds": {part: time.parts[part] / 1e9 for part in PARTS},
            "shares": {part: self.share(time.parts[part]) for part in PARTS},
            "collectives": {
                "seconds": time.collectives / 1e9,
                "covered_seconds": time.covered / 1e9,
                "covered_share": self.covered_share,
            },
            "peak_memory_bytes": self.peak_memory,
            "memory_snapshot": self.snapshot,
            "operators": operators,
        }


class ProfileFolder:
    """The folder of a profile.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def summary(self) -> Path:
        """How the time was spent; it is written last, so the profile is complete if it exists."""
        return self.path / "summary.json"

    def check(self) -> None:
        """Raises `UserError` if something else is in the folder's place."""
        if (self.path.is_symlink() or self.path.exists()) and not self.path.is_dir():
            raise UserError(f"{self.path}: must be a folder, in which callback profiler writes")

    def prepare(self, rank: int) -> None:
        """Makes the folder; the first rank removes the files of an earlier profile and what a kill left of one."""
        self.path.mkdir(exist_ok=True)
        if rank:
            return
        for pattern in ("summary.*", "rank-*.trace.json.gz", "rank-*.memory.pickle", ".*.tmp"):
            for file in self.path.glob(pattern):
                file.unlink()

    def write_rank(self, rank: int, recorded: Recorded) -> RankProfile:
        """Writes the trace and the memory snapshot of a rank; returns what they say."""
        stem = f"rank-{rank:05d}"
        trace = self._write_trace(f"{stem}.trace.json.gz", recorded)
        snapshot = NO_SNAPSHOT if recorded.config.memory else NOT_RECORDED
        if recorded.has_snapshot:
            snapshot = f"{stem}.memory.pickle"
            with self._replacing(snapshot) as temporary:
                recorded.write_snapshot(temporary)
        return RankProfile(
            rank=rank,
            device="cuda" if recorded.on_gpu else "cpu",
            time=split(read_events(trace), on_gpu=recorded.on_gpu),
            peak_memory=peak_memory(trace, on_gpu=recorded.on_gpu),
            snapshot=snapshot,
        )

    def _write_trace(self, name: str, recorded: Recorded) -> dict[str, Any]:
        """Writes a compressed trace, and returns it."""
        plain = self.path / f".{name}.plain.tmp"
        try:
            recorded.write_trace(plain)
            content = plain.read_bytes()
        finally:
            plain.unlink(missing_ok=True)
        with self._replacing(name) as temporary:
            temporary.write_bytes(gzip.compress(content, compresslevel=6, mtime=0))
        trace: dict[str, Any] = json.loads(content)
        return trace

    def write_summary(self, ranks: Sequence[RankProfile], *, first_step: int) -> None:
        """Writes `summary.md`, then `summary.json`."""
        values = {
            "first_step": first_step,
            "steps": len(ranks[0].time.steps),
            "ranks": [rank.to_dict() for rank in ranks],
        }
        with self._replacing("summary.md") as temporary:
            temporary.write_text(table(ranks), encoding="utf-8")
        with self._replacing(self.summary.name) as temporary:
            text = json.dumps(values, indent=2, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    @contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        """A context that gives a temporary file, which then takes the place of the file of that name."""
        temporary = self.path / f".{name}.tmp"
        try:
            yield temporary
            os.replace(temporary, self.path / name)
        finally:
            temporary.unlink(missing_ok=True)


def table(ranks: Sequence[RankProfile]) -> str:
    """The profile as two Markdown tables: a column for each rank, and the first rank's operators."""
    rows = [
        ["", *(f"rank {rank.rank}" for rank in ranks)],
        ["---", *("---:" for _ in ranks)],
        ["seconds a step", *(_seconds_a_step(rank) for rank in ranks)],
    ]
    for part in PARTS:
        rows.append([part, *(_percent(rank.share(rank.time.parts[part])) for rank in ranks)])
    rows.append(
        ["collectives running", *(_percent(rank.share(rank.time.collectives)) for rank in ranks)]
    )
    rows.append(["of which covered", *(_percent(rank.covered_share) for rank in ranks)])
    if any(rank.peak_memory is not None for rank in ranks):
        rows.append(["peak memory", *(_megabytes(rank.peak_memory) for rank in ranks)])
    first = ranks[0]
    rows += [[], [f"operators of rank {first.rank}, by time in themselves", "share", "calls"]]
    rows.append(["---", "---:", "---:"])
    for operator in first.time.operators[:SHOWN_OPERATORS]:
        name = operator.name.replace("|", "/")
        rows.append([f"`{name}`", _percent(first.share(operator.nanoseconds)), str(operator.calls)])
    return "".join(f"| {' | '.join(row)} |\n" if row else "\n" for row in rows)


def _seconds_a_step(rank: RankProfile) -> str:
    return f"{rank.time.wall / len(rank.time.steps) / 1e9:.4g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f} MB"
