"""Files that are whole or not there, also after a crash: flushed to disk, then renamed. And what
is said of those that are damaged all the same."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file by a whole one, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Puts a file's content, or a folder's names, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def gist(error: BaseException) -> str:
    """Of an error about a damaged file: its class and first line."""
    if failures := getattr(error, "failures", None):  # torch's, by rank: what the first one said
        error = next(iter(failures.values()))[0]
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
