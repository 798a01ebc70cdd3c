"""Command-line programs: numbers among their flags, and how they end."""

import functools
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from pose_megatron.runtime.interrupts import CODE, is_interrupted, raise_interrupts, rest
from pose_megatron.runtime.ranges import whole
from pose_megatron.runtime.ranks import rank, world_size

# How long a rank whose mistake may be an echo waits for torchrun to end it. Two seconds were too
# few on a machine under load: rank 0 was ended before its sentence was out.
ECHO_SECONDS = 30
positive = whole(1)  # argparse's `type` of flags that count


def print_error(error: Exception | str) -> None:
    """One sentence on stderr, after the program's name."""
    print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)


def progress(task: str) -> Callable[[str], None]:
    """Says on stderr what comes next, with the seconds since the start."""
    start = time.monotonic()

    def say(doing: str) -> None:
        print(f"{task}: {time.monotonic() - start:.0f} s, {doing}", file=sys.stderr, flush=True)

    return say


def command(main: Callable[[], None]) -> Callable[[], int]:
    """Gives a program its exit code: 0, 1 after a user's mistake, 130 when it was stopped.

    A user's mistake (ValueError, OSError) ends in one sentence, printed by the first rank that
    failed; POSE_TRACEBACK=1 shows its traceback. Every other exception keeps its traceback. A rank
    whose mistake follows another rank's failure prints nothing: it is only an echo, such as a
    collective cut short. Before the ranks have met, rank 0 speaks for all, and a rank that torchrun
    has not ended after `ECHO_SECONDS`, because its mistake is its own, for itself. SIGTERM stops as
    Ctrl-C does, so that `finally` runs; KeyboardInterrupt's argument says what is kept.
    """

    @functools.wraps(main)
    def guarded() -> int:
        raise_interrupts()
        if isinstance(sys.stdout, io.TextIOWrapper):  # a C locale cannot write every name
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            code = _exit_code(main)
        except Exception:
            if world_size() == 1:
                raise
            traceback.print_exc()
            code = 1
        if code and world_size() > 1:
            # The other ranks may be inside a collective, for which leaving the group waits: NCCL
            # for minutes.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        rest()
        if distributed := _process_group():
            distributed.destroy_process_group()
        return code

    return guarded


def _exit_code(main: Callable[[], None]) -> int:
    """Runs `main`, and says how it ended if it ended early."""
    try:
        main()
    except KeyboardInterrupt as stop:
        return _interrupted(str(stop))
    except Exception as error:
        if is_interrupted():
            return _interrupted()
        if world_size() > 1:  # torchrun may end this rank while it waits below
            signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
        if os.environ.get("POSE_TRACEBACK"):
            raise
        if _speaks():
            if not isinstance(error, ValueError | OSError):
                raise
            print_error(_sentence(error))
        return 1
    return 0


def _interrupted(kept: str = "") -> int:
    rest()
    if rank() == 0:
        kept = f", {kept}" if kept else ""
        print(f"{os.path.basename(sys.argv[0])}: interrupted{kept}", file=sys.stderr)
    return CODE


def refuse(error: Exception) -> NoReturn:
    """Ends a program before its `main`, as `command` would."""

    def fail() -> NoReturn:
        raise error

    sys.exit(_exit_code(fail))


def _process_group():
    """torch.distributed, where this process has imported it and joined a group."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed and distributed.is_initialized() else None


def _speaks() -> bool:
    """Whether this rank says why it failed; waits where another rank may be the one to say it."""
    if world_size() == 1:
        return True
    distributed = _process_group()
    if distributed is None:  # the ranks have not met yet, and mostly all see the same mistake
        if rank() != 0:
            time.sleep(ECHO_SECONDS)
        return True
    try:
        store = distributed.distributed_c10d._get_default_store()
        if store.add("pose_megatron/failed", 1) == 1:
            return True
    except RuntimeError:  # the rank that keeps the store is gone already
        pass
    time.sleep(ECHO_SECONDS)
    return False


def _sentence(error: Exception) -> str:
    """The error's message; for an error in a loader process only its last line, no traceback."""
    text = str(error).strip()
    return text.splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text
