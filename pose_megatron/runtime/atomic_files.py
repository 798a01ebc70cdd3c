"""Files that are whole or not there, also after a crash: flushed to disk, then renamed."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from pose_megatron.errors import ConfigError


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's content by `text` as a whole, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Puts a file's content, or a folder's entries, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def staged(target: Path, overwrite: bool, marks: Iterable[str]) -> Iterator[Path]:
    """A new folder beside `target` that takes its place if all goes well, and vanishes if not.

    Args:
        target: --save-dir.
        overwrite: whether a folder at `target` may be replaced.
        marks: names of files; a folder that holds none of them is never replaced.

    Raises:
        ConfigError: `target` is not empty, and must not be replaced.
    """
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not overwrite:
        raise ConfigError(f"--save-dir {target} is not empty; choose another or add --overwrite")
    if occupied and not any((target / name).is_file() for name in marks):
        raise ConfigError(
            f"--save-dir {target} holds no checkpoint that --overwrite could replace; choose "
            "another"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as private:
        folder = Path(private, target.name)  # inside, as others may not read `private` itself
        folder.mkdir()
        yield folder
        for path in (*folder.rglob("*"), folder):
            fsync(path)
        old = Path(f"{private}.old")  # outside: never swept away before the new one is in place
        if occupied:
            target.rename(old)
        folder.rename(target)
        fsync(target.parent)
        if occupied:
            shutil.rmtree(old)
