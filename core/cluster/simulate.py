"""Start and end of every action of a plan, from durations and dependencies alone.

A rank computes its slots in order, each as soon as what it needs has arrived:

- a forward needs the same micro-batch's forward on the stage before;
- a backward, or its part for the input, needs the stage's own forward and the backward of the stage after;
- a weight gradient needs its own part for the input.

A tensor from another rank arrives `transfer` seconds after it was made.
"""

from collections.abc import Callable
from dataclasses import dataclass

from core.cluster.plan import Action, ActionKind, Plan, PlanError, Slot

Durations = Callable[[int, Slot], float]
"""Seconds that a rank takes for a slot."""


def uniform(
    forward: float, backward: float, weight: float = 0.0, pair: float | None = None
) -> Durations:
    """Durations that are the same for all stages.

    Args:
        forward, backward: seconds of a forward and of a whole backward.
        weight: the part of the backward for the weights.
        pair: seconds of an overlapped forward and backward; None: their sum.
    """
    together = forward + backward if pair is None else pair
    alone = {
        ActionKind.FORWARD: forward,
        ActionKind.BACKWARD: backward,
        ActionKind.INPUT: backward - weight,
        ActionKind.WEIGHT: weight,
    }

    def duration(rank: int, slot: Slot) -> float:
        return alone[slot[0].kind] if len(slot) == 1 else together

    return duration


@dataclass(frozen=True)
class TimedSlot:
    """A slot with its time.

    Args:
        slot: what is computed.
        start, end: seconds from the start of the step.
    """

    slot: Slot
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A plan with its times.

    Args:
        plan: what was simulated.
        ranks: the timed slots of each rank, in order.
    """

    plan: Plan
    ranks: tuple[tuple[TimedSlot, ...], ...]

    @property
    def seconds(self) -> float:
        """The end of the last slot of any rank."""
        return max(slots[-1].end for slots in self.ranks if slots)

    def busy(self, rank: int) -> float:
        """The time in which a rank computes."""
        return sum(timed.end - timed.start for timed in self.ranks[rank])

    def bubble(self, rank: int) -> float:
        """The time in which a rank waits, from the start to the end of the step."""
        return self.seconds - self.busy(rank)

    def spent(self, rank: int) -> dict[str, float]:
        """A rank's seconds by what is computed: F, B, I, W, and FB for overlapped pairs."""
        seconds: dict[str, float] = {}
        for timed in self.ranks[rank]:
            name = "".join(action.kind for action in timed.slot)
            seconds[name] = seconds.get(name, 0.0) + timed.end - timed.start
        return seconds


def simulate(plan: Plan, duration: Durations, transfer: float = 0.0) -> Timeline:
    """Finds the times of a plan.

    Args:
        plan: the order of every rank.
        duration: seconds of each slot.
        transfer: seconds until a tensor has reached another rank.

    Raises:
        PlanError: every rank that is not done waits for another one; the message names what waits for what.
    """
    ends: dict[Action, float] = {}
    timed: list[list[TimedSlot]] = [[] for _ in plan.ranks]
    moved = True
    while moved:
        moved = False
        for rank, slots in enumerate(plan.ranks):
            while len(timed[rank]) < len(slots):
                slot = slots[len(timed[rank])]
                ready = _ready(plan, rank, slot, ends, transfer)
                if ready is None:
                    break
                free = timed[rank][-1].end if timed[rank] else 0.0
                start = max(free, ready)
                end = start + duration(rank, slot)
                timed[rank].append(TimedSlot(slot, start, end))
                ends.update(dict.fromkeys(slot, end))
                moved = True
    stuck = [rank for rank, slots in enumerate(plan.ranks) if len(timed[rank]) < len(slots)]
    if stuck:
        raise PlanError(_deadlock(plan, stuck, timed, ends))
    return Timeline(plan, tuple(map(tuple, timed)))


def needs(plan: Plan, action: Action) -> list[Action]:
    """The actions that have to end before one begins."""
    last = len(plan.routes[action.route]) - 1
    place = action.position
    if action.kind is ActionKind.FORWARD:
        return [action.other(ActionKind.FORWARD, place - 1)] if place > 0 else []
    if action.kind is ActionKind.WEIGHT:
        return [action.other(ActionKind.INPUT)]
    found = [action.other(ActionKind.FORWARD)]
    if place < last:
        # whether the later stage splits its backward is that stage's choice
        found.append(action.other(ActionKind.INPUT, place + 1))
    return found


def _ready(
    plan: Plan, rank: int, slot: Slot, ends: dict[Action, float], transfer: float
) -> float | None:
    """The time from which a slot can run; None if something that it needs is not done yet."""
    ready = 0.0
    for action in slot:
        for needed in needs(plan, action):
            end = _end(needed, ends)
            if end is None:
                return None
            if plan.routes[needed.route][needed.position] != rank:
                end += transfer
            ready = max(ready, end)
    return ready


def _end(needed: Action, ends: dict[Action, float]) -> float | None:
    """The end of an action; a whole backward gives the input's gradient too."""
    if needed.kind is ActionKind.INPUT and needed not in ends:
        needed = needed.other(ActionKind.BACKWARD)
    return ends.get(needed)


def _deadlock(
    plan: Plan, stuck: list[int], timed: list[list[TimedSlot]], ends: dict[Action, float]
) -> str:
    """A sentence that says what the stuck ranks wait for."""
    waits = []
    for rank in stuck:
        slot = plan.ranks[rank][len(timed[rank])]
        missing = [n for action in slot for n in needs(plan, action) if _end(n, ends) is None]
        waits.append(f"rank {rank} waits with {slot[0]} for {missing[0]}")
    return f"{plan.name}: deadlock: " + "; ".join(waits)
