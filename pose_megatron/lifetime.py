"""Processes that end with the one that started them (on Linux; elsewhere they may outlive it).

A killed launcher would leave its ranks training on, beside those that replace them; a killed rank
would leave the writers that it forked, which keep its memory and write on into a checkpoint that
the next start writes anew.
"""

import ctypes
import functools
import os
import signal
import sys


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
