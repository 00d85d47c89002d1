"""Schedules of pipelines as plans: 1F1B, interleaved 1F1B, ZB1P, DualPipe and DualPipeV.

| schedule | source | route |
|---|---|---|
| `1f1b` | Narayanan et al., arXiv 2104.04473, figure 4 | ranks 0 to P - 1 |
| `interleaved_1f1b` | the same, section 2.2 | ranks 0 to P - 1, once for each chunk |
| `zb1p` | Qi et al., arXiv 2401.10241, ZB-H1 | ranks 0 to P - 1 |
| `dualpipe` | DeepSeek-V3's report, figure 5 | ranks 0 to P - 1, and back |
| `dualpipev` | DualPipe's halves folded at the middle | ranks 0 to P - 1 to 0 |
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from core.cluster.plan import Action, ActionKind, Plan, Slot
from core.contracts.errors import UserError

Builder = Callable[[int, int, int], Plan]
"""Makes a plan from the ranks, the micro-batches and the chunks of a rank."""


def make_plan(schedule: str, ranks: int, micro_batches: int, chunks: int = 1) -> Plan:
    """The plan of a schedule.

    Args:
        schedule: one of `SCHEDULES`.
        ranks: ranks of the pipeline.
        micro_batches: micro-batches of a step, over all routes.
        chunks: stages that a rank holds; interleaved 1F1B alone reads it.

    Raises:
        UserError: the schedule cannot run so many micro-batches on so many ranks.
    """
    known = ", ".join(SCHEDULES)
    if schedule not in SCHEDULES:
        raise UserError(f"schedule = {schedule!r} must be one of {known}")
    for key, value in (("ranks", ranks), ("micro_batches", micro_batches), ("chunks", chunks)):
        if value < 1:
            raise UserError(f"{key} = {value} must be a whole number of at least 1")
    return SCHEDULES[schedule](ranks, micro_batches, chunks)


def _one_f_one_b(ranks: int, micro_batches: int, chunks: int) -> Plan:
    """1F1B: as many forwards first as there are later ranks, then a forward and a backward in turns."""
    return _depth_first("1f1b", ranks, micro_batches, 1)


def _interleaved(ranks: int, micro_batches: int, chunks: int) -> Plan:
    """Interleaved 1F1B: every rank has several stages, and works on rounds of micro-batches, chunk by chunk."""
    return _depth_first("interleaved_1f1b", ranks, micro_batches, chunks)


def _zb1p(ranks: int, micro_batches: int, chunks: int) -> Plan:
    """ZB1P: 1F1B, whose weight gradients wait until they fill what would be the bubble of the last backwards.

    Rank r begins with weight gradients after r split backwards, so that all ranks keep as many micro-batches as under
    1F1B.
    """
    lists = []
    for rank in range(ranks):
        stage = _Stage(0, rank)
        warm_up = min(ranks - 1 - rank, micro_batches)
        slots = [stage.slot(ActionKind.FORWARD) for _ in range(warm_up)]
        for index in range(micro_batches):
            if index < micro_batches - warm_up:
                slots.append(stage.slot(ActionKind.FORWARD))
            slots.append(stage.slot(ActionKind.INPUT))
            if index >= rank:
                slots.append(stage.slot(ActionKind.WEIGHT))
        while stage.done[ActionKind.WEIGHT] < micro_batches:
            slots.append(stage.slot(ActionKind.WEIGHT))
        lists.append(tuple(slots))
    return Plan("zb1p", (tuple(range(ranks)),), (micro_batches,), tuple(lists))


def _depth_first(name: str, ranks: int, micro_batches: int, chunks: int) -> Plan:
    """(Interleaved) 1F1B: rounds of about as many micro-batches as ranks, computed chunk after chunk."""
    rounds = max(1, micro_batches // ranks)
    if chunks > 1 and micro_batches % rounds:
        raise UserError(
            f"schedule {name}: micro_batches = {micro_batches} must be a multiple of {rounds}, the rounds of "
            f"{ranks} ranks"
        )
    in_round = micro_batches // rounds if chunks > 1 else 1
    lists = []
    for rank in range(ranks):
        stages = [_Stage(0, chunk * ranks + rank) for chunk in range(chunks)]
        after = ranks - 1 - rank
        warm_up = after if chunks == 1 else (chunks - 1) * in_round + 2 * after
        total = micro_batches * chunks
        warm_up = min(warm_up, total)
        slots: list[Slot] = []
        for index in range(total + warm_up):
            if index < total:
                slots.append(stages[index // in_round % chunks].slot(ActionKind.FORWARD))
            if index >= warm_up:
                chunk = chunks - 1 - (index - warm_up) // in_round % chunks
                slots.append(stages[chunk].slot(ActionKind.BACKWARD))
        lists.append(tuple(slots))
    return Plan(name, (tuple(range(ranks)) * chunks,), (micro_batches,), tuple(lists))


def _dualpipe(ranks: int, micro_batches: int, chunks: int) -> Plan:
    """DualPipe: half of the micro-batches enters at either end, and each rank holds a stage of both directions."""
    if ranks % 2:
        raise UserError(f"schedule dualpipe: ranks = {ranks} must be even")
    _check_dual("dualpipe", ranks, micro_batches)
    if micro_batches % 2:
        raise UserError(f"schedule dualpipe: micro_batches = {micro_batches} must be even")
    forth = tuple(range(ranks))
    lists = []
    for rank in range(ranks):
        near = min(rank, ranks - 1 - rank)
        own, other = _Stage(0, rank), _Stage(1, ranks - 1 - rank)
        if rank >= ranks // 2:
            own, other = other, own
        order = _DualOrder(own, other, ranks // 2, near, micro_batches // 2)
        lists.append(tuple(order.slots()))
    half = micro_batches // 2
    return Plan("dualpipe", (forth, forth[::-1]), (half, half), tuple(lists))


def _dualpipev(ranks: int, micro_batches: int, chunks: int) -> Plan:
    """DualPipeV: one route goes down all ranks and back, so that the first rank also holds the last stage."""
    _check_dual("dualpipev", ranks, micro_batches)
    lists = []
    for rank in range(ranks):
        down, up = _Stage(0, rank), _Stage(0, 2 * ranks - 1 - rank)
        lists.append(tuple(_DualOrder(down, up, ranks, rank, micro_batches).slots()))
    forth = tuple(range(ranks))
    return Plan("dualpipev", (forth + forth[::-1],), (micro_batches,), tuple(lists))


def _check_dual(name: str, ranks: int, micro_batches: int) -> None:
    """Raises `UserError` for fewer micro-batches than the schedule needs."""
    if micro_batches < 2 * ranks:
        raise UserError(
            f"schedule {name}: micro_batches = {micro_batches} must be at least {2 * ranks}, twice the ranks"
        )


class _Stage:
    """Numbers the micro-batches of one stage, kind by kind.

    Args:
        route, position: the stage's place.
    """

    def __init__(self, route: int, position: int) -> None:
        self.route = route
        self.position = position
        self.done = dict.fromkeys(ActionKind, 0)

    def next(self, kind: ActionKind) -> Action:
        """The next action of a kind; whole backwards and those of the input share their numbers."""
        count = ActionKind.INPUT if kind is ActionKind.BACKWARD else kind
        action = Action(kind, self.position, self.done[count], self.route)
        self.done[count] += 1
        return action

    def slot(self, kind: ActionKind) -> Slot:
        """The next action of a kind alone."""
        return (self.next(kind),)


@dataclass
class _DualOrder:
    """The order of one rank under DualPipe and DualPipeV, which is the same for both.

    Args:
        near: the stage whose micro-batches the rank reads first.
        far: its other stage.
        half: ranks of a half of the pipeline (DualPipeV: all of them).
        rank: this rank's distance from the end of its half.
        micro_batches: those of one stage.
        waiting: split backwards whose gradients of weights are still to come.
    """

    near: _Stage
    far: _Stage
    half: int
    rank: int
    micro_batches: int
    waiting: list[Action] = field(default_factory=list)

    def slots(self) -> Iterator[Slot]:
        """The eight parts of the schedule, as DeepSeek's DualPipe computes them."""
        inner = self.half - self.rank - 1  # ranks between this one and the middle
        outer = self.rank + 1
        for _ in range(2 * inner):
            yield self.near.slot(ActionKind.FORWARD)
        for _ in range(outer):
            yield self.near.slot(ActionKind.FORWARD)
            yield self.far.slot(ActionKind.FORWARD)
        for _ in range(inner):
            yield self._input(self.far)
            yield self._weight()
            yield self.far.slot(ActionKind.FORWARD)
        for index in range(self.micro_batches - 2 * self.half + outer):
            if index == 0 and inner == 0:  # the middle overlaps its first pair last
                yield self.near.slot(ActionKind.FORWARD)
                yield self.far.slot(ActionKind.BACKWARD)
            else:
                yield self._pair(self.near, self.far)
            yield self._pair(self.far, self.near)
        for _ in range(inner):
            yield self.far.slot(ActionKind.BACKWARD)
            yield self._pair(self.far, self.near)
        yield from self._last_pairs(outer)
        for _ in range(inner):
            yield self._weight()
            yield self._input(self.near)
        while self.waiting:
            yield self._weight()

    def _last_pairs(self, outer: int) -> Iterator[Slot]:
        """Backwards of both stages; from the middle on, the gradients of weights wait."""
        split = False
        for index in range(outer):
            middle = index == outer // 2
            split |= middle and self.rank % 2 == 1
            yield self._input(self.far) if split else self.far.slot(ActionKind.BACKWARD)
            split |= middle and self.rank % 2 == 0
            yield self._input(self.near) if split else self.near.slot(ActionKind.BACKWARD)

    def _pair(self, forward: _Stage, backward: _Stage) -> Slot:
        return (forward.next(ActionKind.FORWARD), backward.next(ActionKind.BACKWARD))

    def _input(self, stage: _Stage) -> Slot:
        action = stage.next(ActionKind.INPUT)
        self.waiting.append(action)
        return (action,)

    def _weight(self) -> Slot:
        return (self.waiting.pop(0).other(ActionKind.WEIGHT),)


SCHEDULES: dict[str, Builder] = {
    "1f1b": _one_f_one_b,
    "interleaved_1f1b": _interleaved,
    "zb1p": _zb1p,
    "dualpipe": _dualpipe,
    "dualpipev": _dualpipev,
}
"""Every schedule by the name that a layout gives it."""
