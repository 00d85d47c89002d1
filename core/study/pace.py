"""The time that a sweep still takes, from the FLOPs of its runs and the speed of those that have ended."""

import heapq
import time
from collections.abc import Callable, Mapping


class Pace:
    """The speed of this runner's runs so far, and the time that is left.

    A run's time is proportional to its work, and each slot works on one run at a time.

    Args:
        work: the FLOPs of each run, in the order in which the runs begin.
        slots: runs at a time.
        clock: seconds.
    """

    def __init__(
        self, work: Mapping[str, float], slots: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.work = work
        self.slots = slots
        self.clock = clock
        self._began: dict[str, float] = {}
        self._ended: set[str] = set()
        self._resumed: set[str] = set()
        self._seconds = 0.0  # of fresh runs that are done
        self._done = 0.0  # their work

    def begin(self, run: str, *, fresh: bool) -> None:
        """Notes that a run is under way; it is not `fresh` if an earlier runner has done a part of it."""
        self._began[run] = self.clock()
        if not fresh:
            self._resumed.add(run)

    def end(self, run: str, *, whole: bool) -> None:
        """Notes that a run has ended, `whole` or failed; the speed is measured on whole fresh runs."""
        self._ended.add(run)
        if whole and run not in self._resumed:
            self._seconds += self.clock() - self._began[run]
            self._done += self.work[run]

    def left(self) -> float | None:
        """Seconds until the last run ends; None before the speed has been measured.

        A run that has taken longer than expected is expected to end now. Each waiting run goes to the slot that is
        free first, as in the runner.
        """
        if not self._done:
            return None
        now = self.clock()
        seconds_per_work = self._seconds / self._done
        ends = []  # when each slot is free
        for run, began in self._began.items():
            if run not in self._ended:
                ends.append(max(now, began + seconds_per_work * self.work[run]))
        ends += [now] * max(1, self.slots - len(ends))
        heapq.heapify(ends)
        for run, work in self.work.items():
            if run not in self._began:
                heapq.heapreplace(ends, ends[0] + seconds_per_work * work)
        return max(ends) - now
