"""The time of profiled steps is split exactly: synthetic traces of CPUs and GPUs, and loops over every nanosecond."""

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from plugins.profiler.analysis import (
    BATCH,
    DATA,
    PARTS,
    PAUSE,
    STEP,
    Event,
    Operator,
    Split,
    peak_memory,
    read_events,
    split,
)
from plugins.profiler.files import ProfileFolder, table
from plugins.profiler.spans import Spans, difference, intersection, length, union

HOST = (1, 1)
GLOO = (1, 2)
STREAM = (0, 7)
OTHER_STREAM = (0, 20)


def event(name: str, category: str, start: int, end: int, thread: Any = HOST) -> Event:
    """An event of the thread of the steps, unless another thread is given."""
    return Event(name, category, thread, start, end)


def mark(name: str, start: int, end: int) -> Event:
    """One of the profiler's own events."""
    return event(name, "user_annotation", start, end)


def op(name: str, start: int, end: int) -> Event:
    """An operator of the thread of the steps."""
    return event(name, "cpu_op", start, end)


def gloo(start: int, end: int) -> Event:
    """A collective that a thread of gloo carries out."""
    return event("gloo:all_reduce", "user_annotation", start, end, GLOO)


def kernel(name: str, start: int, end: int, thread: Any = STREAM) -> Event:
    """A kernel of a GPU."""
    return event(name, "kernel", start, end, thread)


# ---- spans


def moments(spans: Spans) -> set[int]:
    """Every nanosecond of some spans."""
    return {moment for start, end in spans for moment in range(start, end)}


def is_canonical(spans: Spans) -> bool:
    """Whether spans are sorted, not empty, and neither overlap nor touch."""
    ends = [moment for span in spans for moment in span]
    return ends == sorted(set(ends))


@pytest.mark.parametrize("seed", range(5))
def test_operations_on_spans_are_those_on_sets_of_moments(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(60):
        drawn = []
        for _ in range(2):
            starts = [draw.randrange(40) for _ in range(draw.randrange(8))]
            drawn.append([(start, start + draw.randrange(9)) for start in starts])
        one, two = (union(spans) for spans in drawn)
        assert moments(one) == moments(drawn[0])
        results = {
            "intersection": (intersection(one, two), moments(one) & moments(two)),
            "difference": (difference(one, two), moments(one) - moments(two)),
            "union": (union([*one, *two]), moments(one) | moments(two)),
        }
        for name, (found, expected) in results.items():
            assert is_canonical(found), name
            assert moments(found) == expected, name
            assert length(found) == len(expected), name


# ---- the split, against a loop over every nanosecond


@dataclass
class Reference:
    """What a loop over every nanosecond counts."""

    parts: dict[str, int]
    collectives: int = 0
    covered: int = 0


def slow_split(events: list[Event], *, on_gpu: bool) -> Reference:
    """Asks at every nanosecond what is under way, and counts."""
    counted = Reference(dict.fromkeys(PARTS, 0))
    for moment in range(max(event.end for event in events)):
        now = [event for event in events if event.start <= moment < event.end]
        marks = {event.name for event in now if event.category == "user_annotation"}
        if STEP not in marks or PAUSE in marks:
            continue
        if on_gpu:
            kernels = [event for event in now if event.category in ("kernel", "gpu_memcpy")]
            exchanging = running = any("nccl" in event.name for event in kernels)
            computing = any("nccl" not in event.name for event in kernels)
            waiting = BATCH in marks
        else:
            computing, exchanging = thread_does(now, events)
            waiting = any(event.name.startswith("gloo:") for event in now)
            running = waiting or exchanging
        part = "other"
        for name, holds in (
            ("wait", waiting),
            ("exchange", exchanging),
            ("compute", computing),
            ("data", DATA in marks),
        ):
            part = name if holds else part
        counted.parts[part] += 1
        counted.collectives += running
        counted.covered += running and part == "compute"
    return counted


def thread_does(now: list[Event], events: list[Event]) -> tuple[bool, bool]:
    """Whether the thread of the steps computes at a moment, and whether it carries out a collective."""
    computes = False
    for outer in (event for event in now if event.category == "cpu_op"):
        if outer.name.startswith("c10d::"):
            return False, True
        inside = [
            inner
            for inner in events
            if inner.category == "cpu_op" and outer.start <= inner.start and inner.end <= outer.end
        ]
        calls_collective = any(inner.name.startswith("c10d::") for inner in inside)
        if outer.name.startswith(("aten::", "moeloom::")) and not calls_collective:
            computes = True
    return computes, False


def draw_nested(draw: random.Random, start: int, end: int, depth: int) -> list[Event]:
    """Operators of one thread within a span, one after the other, which call others."""
    names = ["aten::mm", "c10d::allreduce_", "moeloom::exchange_counts", "_Finish"]
    names.append("autograd::engine::evaluate_function: _StartBackward")
    drawn = []
    at = start
    while at < end - 2 and depth:
        at += draw.randrange(4)
        until = min(end, at + draw.randrange(1, 30))
        if at < until:
            drawn.append(op(draw.choice(names), at, until))
            drawn += draw_nested(draw, at, until, depth - 1)
        at = until
    return drawn


def draw_trace(draw: random.Random, *, on_gpu: bool) -> list[Event]:
    """Two steps with loading, batches, a pause, and work."""
    drawn = [mark(STEP, 5, 100), mark(STEP, 100, 190)]
    for start in (5, 100):
        loaded = start + draw.randrange(12)
        begun = loaded + draw.randrange(6)
        drawn += [mark(DATA, start, loaded), mark(BATCH, begun, begun + draw.randrange(40, 80))]
    drawn.append(mark(PAUSE, 101, 101 + draw.randrange(1, 8)))
    for _ in range(draw.randrange(1, 6)):
        start = draw.randrange(200)
        end = start + draw.randrange(1, 40)
        drawn.append(
            kernel("ncclDevKernel_AllGather", start, end, OTHER_STREAM)
            if on_gpu
            else gloo(start, end)
        )
    if not on_gpu:
        return drawn + draw_nested(draw, 0, 210, 3)
    for _ in range(draw.randrange(1, 9)):
        start = draw.randrange(200)
        category = draw.choice(["kernel", "gpu_memcpy"])
        drawn.append(event("gemm", category, start, start + draw.randrange(1, 25), STREAM))
    return drawn


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("seed", range(3))
def test_the_split_is_that_of_a_loop_over_every_nanosecond(seed: int, on_gpu: bool) -> None:
    draw = random.Random(seed)
    seen = dict.fromkeys((*PARTS, "covered"), 0)
    for _ in range(12):
        events = draw_trace(draw, on_gpu=on_gpu)
        expected = slow_split(events, on_gpu=on_gpu)
        draw.shuffle(events)
        found = split(events, on_gpu=on_gpu)
        assert dict(found.parts) == expected.parts
        assert (found.collectives, found.covered) == (expected.collectives, expected.covered)
        assert sum(found.parts.values()) == found.wall
        for part in PARTS:
            seen[part] += found.parts[part]
        seen["covered"] += found.covered
    assert all(seen.values()), seen


# ---- the split of traces that are written by hand


def test_a_step_on_a_gpu() -> None:
    events = [
        mark(STEP, 0, 100),
        mark(DATA, 0, 10),
        mark(BATCH, 12, 96),
        kernel("gemm", 20, 50),
        kernel("ncclDevKernel_SendRecv", 40, 70, OTHER_STREAM),
        event("Memcpy DtoD", "gpu_memcpy", 65, 72, STREAM),
        event("ncclDevKernel_SendRecv", "gpu_user_annotation", 0, 100, OTHER_STREAM),
        event(STEP, "gpu_user_annotation", 5, 120, STREAM),  # the GPU's copy of a mark
        op("aten::mm", 15, 18),  # the host starts a kernel
    ]
    found = split(events, on_gpu=True)
    # 20 to 50 and 65 to 72; NCCL alone from 50 to 65; idle within the batch 12 to 20 and 72 to 96
    parts = {"data": 10, "compute": 37, "exchange": 15, "wait": 32, "other": 6}
    assert found == Split(
        steps=(100,),
        parts=parts,
        collectives=30,
        covered=15,
        operators=(
            Operator("gemm", 30, 1),
            Operator("ncclDevKernel_SendRecv", 30, 1),
            Operator("Memcpy DtoD", 7, 1),
        ),
    )


def test_a_step_on_a_cpu() -> None:
    events = [
        mark(STEP, 0, 100),
        mark(DATA, 0, 10),
        op("aten::select", 2, 8),  # of the loader
        op("moeloom::exchange_counts", 20, 50),
        op("aten::empty_like", 21, 24),
        op("c10d::alltoall_base_", 25, 30),
        op("aten::copy_", 26, 28),  # within the collective
        gloo(32, 48),
        op("_Finish", 60, 70),  # waits
        gloo(55, 68),
        op("aten::mm", 62, 66),
        event("aten::copy_", "cpu_op", 33, 47, GLOO),
    ]
    found = split(events, on_gpu=False)
    parts = {"data": 10, "compute": 3 + 4, "exchange": 5, "wait": 16 + 9, "other": 53}
    assert dict(found.parts) == parts
    assert (found.collectives, found.covered) == (5 + 16 + 13, 4)
    own = {operator.name: operator.nanoseconds for operator in found.operators}
    assert own == {
        "moeloom::exchange_counts": 30 - 3 - 5,
        "_Finish": 6,
        "aten::select": 6,
        "aten::mm": 4,
        "aten::empty_like": 3,
        "c10d::alltoall_base_": 3,
        "aten::copy_": 2,
    }
    assert [operator.nanoseconds for operator in found.operators] == sorted(
        own.values(), reverse=True
    )


def test_validation_and_saving_are_no_part_of_a_step() -> None:
    events = [mark(STEP, 0, 50), mark(STEP, 50, 130), mark(PAUSE, 52, 90), mark(PAUSE, 90, 100)]
    events += [op("aten::mm", 60, 95), op("aten::mm", 110, 120), op("aten::mm", 140, 150)]
    found = split(events, on_gpu=False)
    assert found.steps == (50, 80 - 48)
    assert found.parts["compute"] == 10
    assert found.operators == (Operator("aten::mm", 10, 1),)


def test_a_trace_without_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no event is named profiler\.step"):
        split([mark(DATA, 0, 10)], on_gpu=False)


def test_a_trace_is_read_in_whole_nanoseconds() -> None:
    trace = {
        "traceEvents": [
            {
                "ph": "X",
                "cat": "cpu_op",
                "name": "a",
                "pid": 1,
                "tid": 2,
                "ts": 5202383794439.669,
                "dur": 0.007,
            },
            {"ph": "i", "name": "[memory]", "ts": 1.0},
            {"ph": "M", "name": "process_name"},
        ]
    }
    start = 5202383794439669
    assert read_events(trace) == [Event("a", "cpu_op", (1, 2), start, start + 7)]


# ---- the files of a GPU's profile


def chrome(events: list[Event], memory: list[tuple[int, int]]) -> dict[str, Any]:
    """The Chrome trace of some events, and of bytes allocated on devices of a kind."""
    listed: list[dict[str, Any]] = []
    for given in events:
        pid, tid = given.thread
        times = {"ts": given.start / 1000, "dur": (given.end - given.start) / 1000}
        about = {"name": given.name, "cat": given.category, "pid": pid, "tid": tid}
        listed.append({"ph": "X", **about, **times})
    for kind, size in memory:
        details = {"Device Type": kind, "Total Allocated": size}
        listed.append({"ph": "i", "name": "[memory]", "ts": 0.0, "args": details})
    return {"traceEvents": listed}


@dataclass
class FakeRecording:
    """What was recorded of a rank, from a trace that is given."""

    trace: dict[str, Any]
    on_gpu: bool
    memory: bool = True

    @property
    def config(self) -> Any:
        """The keys that the files depend on."""
        return SimpleNamespace(memory=self.memory)

    @property
    def has_snapshot(self) -> bool:
        """Whether allocations were recorded on a GPU."""
        return self.memory and self.on_gpu

    def write_trace(self, file: Path) -> None:
        """Writes the given trace."""
        file.write_text(json.dumps(self.trace))

    def write_snapshot(self, file: Path) -> None:
        """Writes something in place of a snapshot."""
        file.write_bytes(b"snapshot")


GPU_STEP = [
    mark(STEP, 0, 2_000_000),
    mark(BATCH, 0, 2_000_000),
    kernel("gemm", 0, 1_000_000),
    kernel("ncclDevKernel_SendRecv", 500_000, 1_500_000, OTHER_STREAM),
]


def test_the_files_of_a_gpu(tmp_path: Path) -> None:
    trace = chrome(GPU_STEP, memory=[(0, 5), (1, 3_000_000), (1, 2_000_000)])
    folder = ProfileFolder(tmp_path / "profile")
    folder.prepare(0)
    rank = folder.write_rank(3, FakeRecording(trace, on_gpu=True))
    folder.write_summary([rank], first_step=10)
    assert sorted(file.name for file in folder.path.iterdir()) == [
        "rank-00003.memory.pickle",
        "rank-00003.trace.json.gz",
        "summary.json",
        "summary.md",
    ]
    packed = folder.path / "rank-00003.trace.json.gz"
    assert json.loads(gzip.decompress(packed.read_bytes())) == trace
    (found,) = json.loads(folder.summary.read_text())["ranks"]
    assert found["shares"] == {
        "data": 0,
        "compute": 0.5,
        "exchange": 0.25,
        "wait": 0.25,
        "other": 0,
    }
    assert found["seconds"]["compute"] == 0.001
    assert found["collectives"] == {
        "seconds": 0.001,
        "covered_seconds": 0.0005,
        "covered_share": 0.5,
    }
    assert (found["rank"], found["device"], found["peak_memory_bytes"]) == (3, "cuda", 3_000_000)
    assert found["memory_snapshot"] == "rank-00003.memory.pickle"
    shown = (folder.path / "summary.md").read_text().splitlines()
    assert "| seconds a step | 0.002 |" in shown
    assert "| compute | 50.0% |" in shown
    assert "| of which covered | 50.0% |" in shown
    assert "| peak memory | 3.0 MB |" in shown
    assert "| `gemm` | 50.0% | 1 |" in shown


def test_a_cpu_has_no_memory_snapshot_and_says_so(tmp_path: Path) -> None:
    trace = chrome([mark(STEP, 0, 1_000_000)], memory=[(0, 7), (1, 9)])
    folder = ProfileFolder(tmp_path / "profile")
    folder.prepare(0)
    with_memory = folder.write_rank(0, FakeRecording(trace, on_gpu=False))
    without = folder.write_rank(1, FakeRecording(chrome(GPU_STEP, []), on_gpu=True, memory=False))
    assert with_memory.snapshot == "none: torch records a memory snapshot on GPUs only"
    assert (with_memory.peak_memory, without.peak_memory) == (7, None)
    assert without.snapshot == "none: memory = false"
    assert "| of which covered | - | 50.0% |" in table([with_memory, without])
    assert peak_memory(trace, on_gpu=True) == 9


def test_a_profile_that_fails_leaves_no_half_file_and_the_next_removes_an_earlier_one(
    tmp_path: Path,
) -> None:
    folder = ProfileFolder(tmp_path / "profile")
    folder.prepare(0)
    recording = FakeRecording(chrome(GPU_STEP, []), on_gpu=True)

    def breaks(file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    recording.write_snapshot = breaks  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space left"):
        folder.write_rank(0, recording)
    assert [file.name for file in folder.path.iterdir()] == ["rank-00000.trace.json.gz"]
    (folder.path / ".rank-00001.trace.json.gz.plain.tmp").touch()
    (folder.path / "notes.txt").touch()
    folder.prepare(1)
    assert len(list(folder.path.iterdir())) == 3
    folder.prepare(0)
    assert [file.name for file in folder.path.iterdir()] == ["notes.txt"]
