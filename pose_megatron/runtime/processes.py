"""When processes end: with the process that started them.

A killed launcher would leave its ranks training on, beside those that replace them. A killed rank
would leave the writers that it forked: they keep its memory, and go on writing a checkpoint that
the next start writes anew. On Linux children end with their parent; elsewhere they may outlive it.
"""

import ctypes
import functools
import os
import signal
import sys
import threading


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


def leave_signals_to_parent(worker: int = 0) -> None:
    """Has this process ignore the signals that stop a job and may go to all of its processes: its
    parent ends it once it is no longer needed, by a SIGTERM of its own.

    Args:
        worker: its number, which torch's DataLoader gives.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # elsewhere SIGTERM ends it, whoever sends it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parents_sigterm, daemon=True).start()


def _end_by_parents_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
