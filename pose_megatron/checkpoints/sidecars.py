"""Files that go along with a checkpoint, such as a tokenizer's."""

from collections.abc import Iterable
from pathlib import Path

from pose_megatron.errors import ConfigError


def held(folder: Path, files: Iterable[Path]) -> list[Path]:
    """Files of a folder from anywhere, none of which is a link to what lies outside of it.

    In Hugging Face's cache, snapshots/REVISION holds links into blobs/ of the same repository.

    Raises:
        ConfigError: one is: copying it would carry away a file of this machine.
    """
    found, home = list(files), folder.resolve()
    inside = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    for file in found:
        if not {home, inside}.intersection(file.resolve().parents):
            raise ConfigError(
                f"{file} is a link to {file.resolve()}, outside of its folder, "
                "and is not followed: put the file itself there"
            )
    return found
