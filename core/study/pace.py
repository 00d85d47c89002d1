"""How long a sweep still takes: a run's time goes with its FLOPs, and each place works on one run at a time."""

import heapq
import time
from collections.abc import Callable, Mapping


class Pace:
    """What this runner has seen so far of the runs that it works on.

    Args:
        work: of each run, in the order in which they begin, what its time is proportional to.
        slots: runs at a time.
        clock: seconds.
    """

    def __init__(self, work: Mapping[str, float], slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.work, self.slots, self.clock = work, slots, clock
        self._began: dict[str, float] = {}
        self._ended: set[str] = set()
        self._resumed: set[str] = set()
        self._seconds = self._done = 0.0

    def begin(self, run: str, *, fresh: bool) -> None:
        """A run is under way; not `fresh` where an earlier runner left a part of it."""
        self._began[run] = self.clock()
        if not fresh:
            self._resumed.add(run)

    def end(self, run: str, *, whole: bool) -> None:
        """A run has ended, `whole` or failed; a whole fresh one tells the speed."""
        self._ended.add(run)
        if whole and run not in self._resumed:
            self._seconds += self.clock() - self._began[run]
            self._done += self.work[run]

    def left(self) -> float | None:
        """Seconds until the last run ends; None before a first run has told how fast this machine is.

        A run that has taken longer than expected is expected to end now. Runs that wait are given to whichever place
        is free first, as the runner does.
        """
        if not self._done:
            return None
        now, rate = self.clock(), self._seconds / self._done
        under_way = [run for run in self._began if run not in self._ended]
        ends = [max(now, self._began[run] + rate * self.work[run]) for run in under_way]
        ends += [now] * max(1, self.slots - len(ends))
        heapq.heapify(ends)
        for run, work in self.work.items():
            if run not in self._began:
                heapq.heapreplace(ends, ends[0] + rate * work)
        return max(ends) - now
