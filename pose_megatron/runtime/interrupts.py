"""Ctrl-C and SIGTERM: a program ends in one sentence, whatever it is doing.

    while it is imported   at once, as nothing has begun               end_at_once()
    while it works         a KeyboardInterrupt, so that `finally` runs raise_interrupts()
    while Python ends      at once, with the exit code it has          end_at_once(code)

Nothing is imported here that takes time: a program calls `end_at_once` before its other imports.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CODE = 130  # as shells give a program that Ctrl-C ended
PATIENCE = 5.0  # seconds in which a program that ends takes no second signal
INSIST = 0.2  # seconds after which a KeyboardInterrupt that was swallowed is raised again

_since: float | None = None  # when the signal came


def end_at_once(code: int | None = None) -> None:
    """From now on a signal ends the process; for programs only.

    Args:
        code: its exit code, once its work is done; None before.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if code is None:
            _say()
        os._exit(CODE if code is None else code)

    handle(end)
    sys.unraisablehook = _without_interrupts


def raise_interrupts() -> None:
    """From now on a signal raises KeyboardInterrupt; a second one, after `PATIENCE`, ends the
    process.

    Some libraries swallow it, such as torch while it imports numpy: then it is raised again.
    """
    global _since
    _since = None
    handle(_raise)


def rest() -> None:
    """The program has ended its work: a KeyboardInterrupt is not raised again."""
    if _since is not None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)


def is_interrupted() -> bool:
    """Whether a signal has come since `raise_interrupts`; some libraries make another error of
    the KeyboardInterrupt."""
    return _since is not None


def handle(
    handler: Callable[[int, FrameType | None], None], signals: Iterable[signal.Signals] = SIGNALS
) -> None:
    """Has the signals handled so, but for those that this process was started to ignore, as nohup
    and shells start background jobs."""
    for number in signals:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    global _since
    if _since is None:
        _since = time.monotonic()
        signal.signal(signal.SIGALRM, _insist)
        signal.setitimer(signal.ITIMER_REAL, INSIST, INSIST)
        raise KeyboardInterrupt
    if time.monotonic() > _since + PATIENCE:
        _say()
        os._exit(CODE)


def _insist(number: int, frame: FrameType | None) -> None:
    error = sys.exc_info()[1]
    while error is not None:  # what `finally` and `except` blocks are at work on now
        if isinstance(error, KeyboardInterrupt):
            return
        error = error.__context__
    raise KeyboardInterrupt


def _without_interrupts(unraisable) -> None:
    """In a destructor or a callback Python prints the exception and goes on."""
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)


def _say() -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted\n".encode(errors="replace"))
