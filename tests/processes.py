"""Other processes in tests."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def running(code: str, *words, **options) -> Iterator[subprocess.Popen]:
    """Python code in a process of its own, ended at the end if it still runs; its output is text.

    Args:
        words: what follows in sys.argv.
        options: of subprocess.Popen, beside stdout.
    """
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        text=True,
        **options,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
