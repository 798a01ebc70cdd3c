"""When a run stops before its end: by a signal to any rank, by Ctrl-C, or by the clock.

All ranks have to leave a step at the same micro-batch: one that leaves alone leaves the others in a
collective. So before each micro-batch every rank votes, and looks at the votes on an earlier one,
which have been counted in the background by then and are the same everywhere.
"""

import datetime
import math
import signal
import time
from collections import deque

import torch
import torch.distributed as dist

from pose_megatron.runtime.interrupts import handle


class Stop:
    """Whether to stop; every rank makes one, and asks it at the same places.

    Args:
        minutes: --exit-duration-in-mins, counted from here; None for no limit.
        lag: how many micro-batches ago the votes were cast that decide: as many as the ranks of a
            pipeline are apart, or they would wait for each other.
        timeout_minutes: how long a count may take.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    NAMES = (*(number.name for number in SIGNALS), "--exit-duration-in-mins")
    # Ctrl-C reaches a rank twice, from the terminal and from torchrun. Later, somebody insists.
    INSISTS_AFTER = 3.0  # seconds

    def __init__(self, minutes: float | None, lag: int = 1, timeout_minutes: int = 10):
        self.deadline = time.monotonic() + 60 * minutes if minutes else math.inf
        self.lag = lag
        self.reason: str | None = None  # the same on all ranks, once they agree
        self._caught, self._caught_at = 0, math.inf
        self._votes: deque[tuple[dist.Work, torch.Tensor]] = deque()
        timeout = datetime.timedelta(minutes=timeout_minutes)
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        handle(self._catch, self.SIGNALS)

    def _catch(self, number: int, frame) -> None:
        now = time.monotonic()
        if number == self._caught == signal.SIGINT and now > self._caught_at + self.INSISTS_AFTER:
            raise KeyboardInterrupt
        if not self._caught:
            self._caught, self._caught_at = number, now

    def before_micro_batch(self) -> bool:
        """Whether to stop here."""
        if self.reason is None:
            self._vote()
            if len(self._votes) > self.lag:
                self._count()
        return self.reason is not None

    def between_steps(self) -> bool:
        """Whether to stop here, where all ranks wait for each other anyway."""
        if self.reason is None:
            self._vote()
        while self._votes:
            self._count()
        return self.reason is not None

    def _vote(self) -> None:
        late = time.monotonic() > self.deadline
        own = torch.tensor([*(self._caught == number for number in self.SIGNALS), late])
        votes = own.to(torch.int32)
        work = dist.all_reduce(votes, group=self._group, async_op=True)
        self._votes.append((work, votes))

    def _count(self) -> None:
        """The first reason for which any rank has voted."""
        work, votes = self._votes.popleft()
        work.wait()
        names = [name for name, count in zip(self.NAMES, votes.tolist(), strict=True) if count]
        self.reason = self.reason or next(iter(names), None)
