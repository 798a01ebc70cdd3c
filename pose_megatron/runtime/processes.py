"""When processes end: with the process that started them, or because they are told to.

A killed launcher would leave its ranks training on, beside those that replace them. A killed rank
would leave the writers that it forked: they keep its memory, and go on writing a checkpoint that
the next start writes anew. On Linux children end with their parent; elsewhere they may outlive it.
"""

import ctypes
import functools
import math
import os
import signal
import sys
import time
from collections.abc import Sequence


def end_with_parent(parent: int) -> None:
    """Has this process killed when its parent, whose process id is `parent`, ends."""
    if sys.platform != "linux":
        return
    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1
    prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the line above
        os._exit(1)


@functools.cache
def children_end_with_this() -> None:
    """Has every process that this one forks from now on killed when this one ends."""
    parent = 0

    def note() -> None:
        nonlocal parent
        parent = os.getpid()

    os.register_at_fork(before=note, after_in_child=lambda: end_with_parent(parent))


class Stop:
    """Whether to stop before --train-iters: by a signal to any rank, or by the clock.

    Args:
        minutes: --exit-duration-in-mins, counted from here; None for no limit.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, minutes: float | None):
        self.deadline = time.monotonic() + 60 * minutes if minutes else math.inf
        self.caught = 0
        for number in self.SIGNALS:
            signal.signal(number, self._catch)

    def _catch(self, number: int, frame) -> None:
        self.caught = number

    def stop_votes(self) -> list[float]:
        """This rank's stop votes, one float per reason; all-reduced with the step's loss."""
        late = time.monotonic() > self.deadline
        return [*(float(self.caught == number) for number in self.SIGNALS), float(late)]

    def reason(self, stop_votes: Sequence[float]) -> str | None:
        """The first reason any rank voted for, or None to continue.

        Args:
            stop_votes: summed over the ranks.
        """
        names = [*(number.name for number in self.SIGNALS), "--exit-duration-in-mins"]
        return next((name for name, count in zip(names, stop_votes, strict=True) if count), None)
