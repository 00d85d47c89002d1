"""A schedule of a pipeline as a plan: for each rank an ordered list of what it computes.

Nothing here runs anything. A plan says only in which order a rank computes; `core.cluster.simulate` finds the times.

A *route* is the way of a micro-batch through the ranks: `route[position]` is the rank that holds the position-th stage.
Most schedules have one route; DualPipe has two in opposite directions, over two copies of every weight. A rank's
stages are its *chunks*, numbered in the order of (route, position).
"""

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property


class ActionKind(StrEnum):
    """What an action computes.

    A backward is either whole (B) or split into the gradient of the stage's input (I) and that of its weights (W).
    """

    FORWARD = "F"
    BACKWARD = "B"
    INPUT = "I"
    WEIGHT = "W"


@dataclass(frozen=True)
class Action:
    """The work of one stage for one micro-batch.

    Args:
        kind: forward, or a backward or a part of it.
        position: the stage's place on its route.
        micro_batch: its number on the route, from 0.
        route: the route's number.
    """

    kind: ActionKind
    position: int
    micro_batch: int
    route: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch} of stage {self.position} on route {self.route}"

    def other(self, kind: ActionKind, position: int | None = None) -> "Action":
        """The action of another kind, or of another stage, for the same micro-batch."""
        place = self.position if position is None else position
        return Action(kind, place, self.micro_batch, self.route)


Slot = tuple[Action, ...]
"""What a rank computes at one time: one action, or a forward beside a backward of another micro-batch."""


class PlanError(ValueError):
    """A plan is incomplete, or can never end."""


@dataclass(frozen=True)
class Plan:
    """The order in which every rank computes.

    Args:
        name: the schedule's.
        routes: the ranks of each route, by position.
        micro_batches: how many pass through each route.
        ranks: the slots of each rank, in order.
    """

    name: str
    routes: tuple[tuple[int, ...], ...]
    micro_batches: tuple[int, ...]
    ranks: tuple[tuple[Slot, ...], ...]

    def chunks(self, rank: int) -> list[tuple[int, int]]:
        """The (route, position) of every stage that a rank holds."""
        held = []
        for number, route in enumerate(self.routes):
            held += [(number, place) for place, owner in enumerate(route) if owner == rank]
        return held

    def chunk(self, rank: int, action: Action) -> int:
        """The number of an action's chunk on its rank."""
        return self.chunks(rank).index((action.route, action.position))

    def actions(self, rank: int) -> list[Action]:
        """A rank's actions in order, those of one slot one after the other."""
        return [action for slot in self.ranks[rank] for action in slot]

    def count(self, rank: int, kind: ActionKind) -> int:
        """The number of a rank's actions of one kind."""
        return sum(action.kind is kind for action in self.actions(rank))

    def peak_in_flight(self, rank: int) -> int:
        """The most micro-batches of all of its chunks together whose activations a rank keeps at once.

        A forward adds one. A backward, or its part for the input, takes it away; what its part for the weights still
        needs is counted by `peak_weight_parts`. Of an overlapped pair both micro-batches are there.
        """
        return self._peaks[rank][0]

    def peak_by_chunk(self, rank: int) -> list[int]:
        """The most micro-batches that a rank keeps of each of its chunks."""
        return self._peaks[rank][1]

    @cached_property
    def _peaks(self) -> list[tuple[int, list[int]]]:
        """The peak of all chunks together, and those of each, by rank."""
        return [self._peaks_of(rank) for rank in range(len(self.ranks))]

    def _peaks_of(self, rank: int) -> tuple[int, list[int]]:
        chunks = self.chunks(rank)
        held = [0] * len(chunks)
        most = [0] * len(chunks)
        together = 0
        for action in _forwards_first(self.ranks[rank]):
            index = chunks.index((action.route, action.position))
            held[index] += _held_after(action)
            most[index] = max(most[index], held[index])
            together = max(together, sum(held))
        return together, most

    def peak_weight_parts(self, rank: int) -> int:
        """The most split backwards whose part for the weights is still to come."""
        waiting = 0
        most = 0
        for action in self.actions(rank):
            waiting += action.kind is ActionKind.INPUT
            waiting -= action.kind is ActionKind.WEIGHT
            most = max(most, waiting)
        return most

    def check(self) -> None:
        """Raises `PlanError` unless each stage computes each micro-batch once, forwards and backwards."""
        seen: Counter[Action] = Counter()
        for rank in range(len(self.ranks)):
            for action in self.actions(rank):
                if self.routes[action.route][action.position] != rank:
                    raise PlanError(f"{self.name}: rank {rank} does not hold {action}")
                seen[action] += 1
        for number, route in enumerate(self.routes):
            for position in range(len(route)):
                for micro_batch in range(self.micro_batches[number]):
                    forward = Action(ActionKind.FORWARD, position, micro_batch, number)
                    found = [seen.pop(forward.other(kind), 0) for kind in ActionKind]
                    if found not in ([1, 1, 0, 0], [1, 0, 1, 1]):
                        counts = ", ".join(
                            f"{k} {n}" for k, n in zip(ActionKind, found, strict=True)
                        )
                        place = f"stage {position} on route {number}, micro-batch {micro_batch}"
                        raise PlanError(f"{self.name}: {place} is computed as {counts}")
        if seen:
            raise PlanError(f"{self.name}: {next(iter(seen))} is of no micro-batch")


def _forwards_first(slots: tuple[Slot, ...]) -> list[Action]:
    """The actions of slots in order; of a pair the forward first."""
    return [
        a for slot in slots for a in sorted(slot, key=lambda a: a.kind is not ActionKind.FORWARD)
    ]


def _held_after(action: Action) -> int:
    """How many more micro-batches an action leaves in memory."""
    if action.kind is ActionKind.FORWARD:
        return 1
    return -1 if action.kind in (ActionKind.BACKWARD, ActionKind.INPUT) else 0
