"""Outputs that are whole or not there, also after a crash: flushed to disk, then renamed.

Beside an output NAME may lie, hidden, what one job at a time (ownership.py) keeps there:

    .NAME.draft/    what is being written
    .NAME.whole/    finished files on their way to their places; the next job takes them there
    .NAME.old/      a folder that is being replaced; the next job puts it back, or removes it
    .NAME.trash/    what is being deleted

What a killed job has left there the next one for the same output mends and removes.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pose_megatron.errors import ConfigError
from pose_megatron.runtime.ownership import owned


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's content by `text` as a whole, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        temporary.replace(path)
    except OSError:  # such as a full disk
        temporary.unlink(missing_ok=True)
        raise
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
    """A new folder that takes the place of `target` if all goes well, and vanishes if not.

    Args:
        target: --save-dir.
        overwrite: whether a folder at `target` may be replaced.
        marks: names of files; a folder that holds none of them is never replaced.

    Raises:
        ConfigError: `target` is not empty, and must not be replaced; or another job writes it.
    """
    with owned(target, f"--save-dir {target}") as ownership:
        _settle(target)
        occupied = not _is_vacant(target)
        if occupied and not overwrite:
            raise ConfigError(
                f"--save-dir {target} is not empty; choose another or add --overwrite"
            )
        if occupied and not any((target / name).is_file() for name in marks):
            raise ConfigError(
                f"--save-dir {target} holds no checkpoint that --overwrite could replace; choose "
                "another"
            )
        folder = _draft(target)
        folder.parent.mkdir(mode=0o700)
        try:
            folder.mkdir()  # inside, as others may not read what is around it
            yield folder
            for path in (*folder.rglob("*"), folder):
                fsync(path)
            ownership.check()
            if occupied:
                target.rename(_beside(target, "old"))
            folder.rename(target)
            fsync(target.parent)
        finally:
            if not ownership.is_lost:
                _settle(target)


def _settle(target: Path) -> None:
    """Ends what a job has begun beside its target, wherever it was stopped."""
    draft, old, trash = (_beside(target, name) for name in ("draft", "old", "trash"))
    if old.exists() and _draft(target).exists():  # the new one has not taken its place
        if not _is_vacant(target):
            raise ConfigError(
                f"--save-dir {target}: a job that was to replace it was killed, what it was is in "
                f"{old}, and since then something else was put there; move one of them away"
            )
        old.rename(target)
    if old.exists():
        _remove(trash)
        old.rename(trash)  # what is half deleted must not be put back
    _remove(trash)
    _remove(draft)


def _draft(target: Path) -> Path:
    return _beside(target, "draft") / target.name


def _is_vacant(target: Path) -> bool:
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


@contextlib.contextmanager
def staged_files(
    prefix: str | Path, what: str, names: Sequence[str], overwrite: bool
) -> Iterator[Path]:
    """A new folder whose files take their places in the folder of `prefix` if all goes well.

    From one set of files to the next, readers find none: those by which they find a set, .idx and
    .json, are removed first and come last.

    Args:
        prefix: whose files they are; one job at a time has it.
        what: how messages begin: the flag and its value.
        names: of the files; the block must write all of them, and what else it writes is removed.
        overwrite: whether existing files may be replaced.

    Raises:
        ConfigError: a file exists, and must not be replaced; or another job writes them.
    """
    prefix = Path(prefix)
    draft, whole = _beside(prefix, "draft"), _beside(prefix, "whole")
    with owned(prefix, what) as ownership:
        _place(whole)
        _remove(draft)
        for name in names:
            if (path := prefix.with_name(name)).exists() and not overwrite:
                raise ConfigError(
                    f"{what}: {path} exists; choose another, or replace it with --overwrite"
                )
        draft.mkdir()
        try:
            yield draft
            for path in draft.iterdir():
                if path.name in names:
                    fsync(path)
                else:
                    path.unlink()
            ownership.check()
            draft.rename(whole)
            fsync(draft.parent)
            _place(whole)
        finally:
            if not ownership.is_lost:
                _remove(draft)


def _place(whole: Path) -> None:
    """Takes finished files to their places; may be repeated after a crash."""
    if not whole.is_dir():
        return
    files = sorted(whole.iterdir(), key=lambda path: ("", ".idx", ".json").index(_mark(path)))
    for file in reversed(files):
        (whole.parent / file.name).unlink(missing_ok=True)
    for file in files:
        file.replace(whole.parent / file.name)
    fsync(whole.parent)
    whole.rmdir()


def _mark(path: Path) -> str:
    return path.suffix if path.suffix in (".idx", ".json") else ""


def _beside(path: Path, name: str) -> Path:
    return path.with_name(f".{path.name}.{name}")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
