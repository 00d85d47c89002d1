"""How the time of profiled steps is spent, computed from the events of a trace; needs no torch.

Every moment of the profiled steps belongs to one part, the first of this list that claims it:

- data: the loader is waited for;
- compute: a kernel or a copy runs on the GPU that belongs to no collective; on CPUs, the thread of the steps is in an
  operator that belongs to no collective and contains none;
- exchange: a kernel of NCCL runs on the GPU; on CPUs, the thread is in an operator that belongs to a collective;
- wait: the training step is under way and the GPU is idle; on CPUs, a collective runs in another thread, and the thread
  of the steps is in no operator that computes;
- other: everything else.

The profiled time begins with the loader's work for the first step and ends with the last step. Validation and saving in
between are not part of it.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plugins.profiler.spans import Span, Spans, difference, intersection, length, union

STEP = "profiler.step"
"""The name of the events that are steps, from the end of the step before."""

DATA = "profiler.data"
"""The name of the events in which the loader is waited for."""

BATCH = "profiler.batch"
"""The name of the events that are training steps, without what other callbacks do before and after."""

PAUSE = "profiler.pause"
"""The name of the events that are validation or saving, and not part of a step."""

PARTS = ("data", "compute", "exchange", "wait", "other")
"""The parts of the profiled time, in the order in which they claim its moments."""

DEVICE_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
"""The categories of what a GPU does."""

COLLECTIVE_PREFIXES = ("c10d::", "_c10d_functional::", "record_param_comms", "nccl:", "gloo:")
"""How the names of operators that belong to collectives begin."""

NO_WORK = ("autograd::", "torch::")
"""How the names of operators begin that call others and do nothing themselves, but may wait."""

SHOWN_NAME = 100
"""Characters of the longest operator's name that is shown."""


@dataclass(frozen=True)
class Event:
    """Something that took time.

    Args:
        name: what it is.
        category: Kineto's category, such as `cpu_op`, `kernel` or `user_annotation`.
        thread: process and thread, or device and stream.
        start, end: nanoseconds of the trace's clock.
    """

    name: str
    category: str
    thread: tuple[Any, Any]
    start: int
    end: int

    @property
    def span(self) -> Span:
        """The time that it took."""
        return self.start, self.end


@dataclass(frozen=True)
class Operator:
    """All calls of one operator or kernel within the profiled steps.

    Args:
        name: its name.
        nanoseconds: time in itself, without the operators that it called.
        calls: how often it was called.
    """

    name: str
    nanoseconds: int
    calls: int


@dataclass(frozen=True)
class Split:
    """How the time of the profiled steps was spent, in ns.

    Args:
        steps: the length of each step.
        parts: the length of each of `PARTS`; they add up to the steps.
        collectives: how long at least one collective ran.
        covered: how much of that lies in the part `compute`.
        operators: the operators of the steps' thread, or the kernels of the GPU; most time first.
    """

    steps: tuple[int, ...]
    parts: Mapping[str, int]
    collectives: int
    covered: int
    operators: tuple[Operator, ...]

    @property
    def wall(self) -> int:
        """The length of all steps together."""
        return sum(self.steps)


def read_events(trace: Mapping[str, Any]) -> list[Event]:
    """The events of a Chrome trace that have a length; its times are in microseconds with three decimals."""
    events = []
    for event in trace["traceEvents"]:
        if event.get("ph") != "X" or "dur" not in event:
            continue
        start = round(event["ts"] * 1000)
        end = start + round(event["dur"] * 1000)
        thread = (event.get("pid"), event.get("tid"))
        events.append(Event(event["name"], event.get("cat", ""), thread, start, end))
    return events


def split(events: Sequence[Event], *, on_gpu: bool) -> Split:
    """Splits the time of the profiled steps.

    Args:
        events: the events of one rank, with those that `STEP`, `DATA`, `BATCH` and `PAUSE` name.
        on_gpu: whether the model is on a GPU.

    Raises:
        ValueError: no event is a step.
    """
    steps = [event for event in events if _is_mark(event, STEP)]
    if not steps:
        raise ValueError(f"no event is named {STEP}")
    pauses = _marked(events, PAUSE)
    profiled = difference(union(step.span for step in steps), pauses)
    if on_gpu:
        work = _work_of_gpu(events)
    else:
        work = _work_of_thread(events, steps[0].thread)
    claims = {
        "data": _marked(events, DATA),
        "compute": work.compute,
        "exchange": work.exchange,
        "wait": work.wait,
    }
    taken = {}
    rest = profiled
    for part, claimed in claims.items():
        taken[part] = intersection(rest, claimed)
        rest = difference(rest, claimed)
    taken["other"] = rest
    collectives = intersection(profiled, work.collectives)
    return Split(
        steps=tuple(length(difference([step.span], pauses)) for step in sorted(steps, key=_start)),
        parts={part: length(taken[part]) for part in PARTS},
        collectives=length(collectives),
        covered=length(intersection(collectives, taken["compute"])),
        operators=_operators(work.listed, profiled),
    )


def peak_memory(trace: Mapping[str, Any], *, on_gpu: bool) -> int | None:
    """The most bytes that were allocated at once; None if allocations are not recorded.

    Args:
        trace: a Chrome trace.
        on_gpu: whether the memory of GPUs is meant, or that of the CPU.
    """
    kind = 1 if on_gpu else 0
    allocated = []
    for event in trace["traceEvents"]:
        details = event.get("args", {})
        if event.get("name") == "[memory]" and details.get("Device Type") == kind:
            allocated.append(int(details["Total Allocated"]))
    return max(allocated, default=None)


@dataclass(frozen=True)
class _Work:
    """What the device of a rank did: moments of computing, of exchange, of waiting, of running collectives.

    `listed` are the operators or kernels with the time in themselves.
    """

    compute: Spans
    exchange: Spans
    wait: Spans
    collectives: Spans
    listed: Sequence[tuple[Event, int]]


def _work_of_gpu(events: Sequence[Event]) -> _Work:
    """What a GPU did, on all of its streams."""
    kernels = [event for event in events if event.category in DEVICE_CATEGORIES]
    computing = []
    exchanging = []
    for kernel in kernels:
        if "nccl" in kernel.name.lower():
            exchanging.append(kernel.span)
        else:
            computing.append(kernel.span)
    exchange = union(exchanging)
    listed = [(kernel, kernel.end - kernel.start) for kernel in kernels]
    return _Work(union(computing), exchange, _marked(events, BATCH), exchange, listed)


def _work_of_thread(events: Sequence[Event], thread: tuple[Any, Any]) -> _Work:
    """What the thread of the steps did, and when the threads of gloo were at work.

    An operator that contains a collective may wait for it, so only the operators that it called count as computing.
    """
    own = [event for event in events if event.thread == thread and event.category == "cpu_op"]
    nested = _nested(own)
    exchange = union(entry.event.span for entry in nested if entry.is_collective)
    computing = []
    for entry in nested:
        if not entry.is_collective and not entry.has_collective and _does_work(entry.event.name):
            computing.append(entry.event.span)
    running = [event.span for event in events if event.name.startswith("gloo:")]
    collectives = union([*running, *exchange])
    listed = [(entry.event, entry.self_time) for entry in nested]
    return _Work(
        difference(union(computing), exchange), exchange, union(running), collectives, listed
    )


@dataclass
class _Nested:
    """An operator of one thread.

    Args:
        event: the operator.
        self_time: ns in the operator itself, without those that it called.
        is_collective: whether it belongs to a collective.
        has_collective: whether it called an operator that does.
    """

    event: Event
    self_time: int
    is_collective: bool
    has_collective: bool = False


def _nested(events: Iterable[Event]) -> list[_Nested]:
    """The operators of one thread, in which later ones are called by those that have not ended."""
    found = []
    open_entries: list[_Nested] = []
    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        entry = _Nested(event, event.end - event.start, is_collective(event.name))
        while open_entries and open_entries[-1].event.end <= event.start:
            open_entries.pop()
        if open_entries:
            caller = open_entries[-1]
            caller.self_time -= min(event.end, caller.event.end) - event.start
        if entry.is_collective:
            for caller in open_entries:
                caller.has_collective = True
        open_entries.append(entry)
        found.append(entry)
    return found


def is_collective(name: str) -> bool:
    """Whether an operator belongs to a collective, by its name."""
    return name.startswith(COLLECTIVE_PREFIXES)


def _does_work(name: str) -> bool:
    """Whether an operator computes: it has a namespace, as `aten::mm` has, and is no part of autograd's engine.

    An `autograd.Function` has no namespace. What it calls counts; the rest of its time may be waiting.
    """
    return "::" in name and not name.startswith(NO_WORK)


def _operators(listed: Sequence[tuple[Event, int]], profiled: Spans) -> tuple[Operator, ...]:
    """The operators that began within the profiled time, added up by name, most time first."""
    time: dict[str, int] = defaultdict(int)
    calls: dict[str, int] = defaultdict(int)
    at = 0
    for event, nanoseconds in sorted(listed, key=lambda pair: pair[0].start):
        while at < len(profiled) and profiled[at][1] <= event.start:
            at += 1
        if at < len(profiled) and profiled[at][0] <= event.start:
            name = event.name[:SHOWN_NAME]
            time[name] += nanoseconds
            calls[name] += 1
    names = sorted(time, key=lambda name: (-time[name], name))
    return tuple(Operator(name, time[name], calls[name]) for name in names)


def _is_mark(event: Event, name: str) -> bool:
    """Whether an event is one of the profiler's own; a GPU's copy of it, of another category, is not."""
    return event.name == name and event.category == "user_annotation"


def _marked(events: Iterable[Event], name: str) -> Spans:
    return union(event.span for event in events if _is_mark(event, name))


def _start(event: Event) -> int:
    return event.start
