"""Other processes in tests."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

# Seconds after which a test takes a process for hung: even on a machine whose cores do the work of
# ten, none that ends needs as long.
PATIENCE = 900


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
