"""A command-line program: numbers among its flags, and how it ends.

The light form, for tools of one process. Programs of several ranks end as `distributed` says.
"""

import argparse
import functools
import os
import signal
import sys
from collections.abc import Callable


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def print_error(error: Exception | str) -> None:
    """One sentence on stderr, after the program's name."""
    print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)


def one_sentence_errors(main: Callable[[], None]) -> Callable[[], int]:
    """Gives `main` an exit code: 1 after a user's mistake, said in one sentence, 130 when stopped.

    SIGTERM stops as Ctrl-C does, so that `finally` runs; KeyboardInterrupt's argument, if any, says
    what is left. What is not a user's mistake (anything but ValueError and OSError) keeps its
    traceback, and POSE_TRACEBACK=1 shows that of the others.
    """

    @functools.wraps(main)
    def guarded() -> int:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            main()
        except (ValueError, OSError) as error:
            if os.environ.get("POSE_TRACEBACK"):
                raise
            print_error(error)
            return 1
        except KeyboardInterrupt as stop:
            left = f", {stop}" if str(stop) else ""
            print(f"{os.path.basename(sys.argv[0])}: interrupted{left}", file=sys.stderr)
            return 130
        return 0

    return guarded
