"""Pointers of Git LFS: small text files that stand where large files were not downloaded."""

from pathlib import Path

_FIRST_LINE = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: Path, error: type[Exception]) -> None:
    """Raises `error`, with the way out, where the file is such a pointer."""
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(len(_FIRST_LINE)) == _FIRST_LINE
    except OSError:  # whoever opens it says why
        return
    if is_pointer:
        raise error(
            f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in its folder, or "
            "download the file"
        )
