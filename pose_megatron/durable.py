"""Files that are whole or not there, also after a crash: flushed to disk, then renamed."""

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
