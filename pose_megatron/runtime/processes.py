"""When processes end: with the one that started them, or because they are told to.

A killed launcher would leave its ranks training on, beside those that replace them; a killed rank
would leave the writers that it forked, which keep its memory and write on into a checkpoint that
the next start writes anew. On Linux they end with it; elsewhere they may outlive it.
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
    """This process is killed when its parent, process number `parent`, ends."""
    if sys.platform != "linux":
        return
    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1
    prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


@functools.cache
def children_end_with_this() -> None:
    """Whatever this process forks from now on is killed when it ends."""
    parent = 0

    def note() -> None:
        nonlocal parent
        parent = os.getpid()

    os.register_at_fork(before=note, after_in_child=lambda: end_with_parent(parent))


class Stop:
    """Whether to end before --train-iters: by a signal to any rank, or by the clock."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, minutes: float | None):
        self.deadline = time.monotonic() + 60 * minutes if minutes else math.inf
        self.caught = 0
        for number in self.SIGNALS:
            signal.signal(number, self._catch)

    def _catch(self, number: int, frame) -> None:
        self.caught = number

    def votes(self) -> list[float]:
        """Of this rank, one for each reason; they travel with the loss of a step."""
        late = time.monotonic() > self.deadline
        return [*(float(self.caught == number) for number in self.SIGNALS), float(late)]

    def reason(self, votes: Sequence[float]) -> str | None:
        """That of any rank, from the sums; None to go on."""
        names = [*(number.name for number in self.SIGNALS), "--exit-duration-in-mins"]
        return next((name for name, count in zip(names, votes, strict=True) if count), None)
