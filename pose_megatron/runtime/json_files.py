"""JSON files that hold one object, and messages that name the file they are about."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from pose_megatron.errors import ConfigError, DamagedCheckpoint
from pose_megatron.runtime.lfs_pointers import refuse_lfs_pointer


def read_json(path: Path, error: type[ValueError] = ConfigError) -> dict:
    """The JSON object in a file.

    Args:
        error: what is raised; DamagedCheckpoint where the file is a part of a checkpoint.

    Raises:
        ConfigError: the file is missing, is not JSON, or holds something other than an object.
    """
    if not path.is_file():
        raise error(f"{path} is missing")
    refuse_lfs_pointer(path, error)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as reason:
        raise error(f"{path} is not JSON: {reason}") from None
    if not isinstance(content, dict):
        raise error(f"{path} is not a JSON object")
    return content


def write_json(path: Path, content: dict) -> None:
    """Writes an object, indented by two spaces."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the path in front of messages about what is in it; a DamagedCheckpoint stays one, every
    other ValueError becomes a ConfigError."""
    try:
        yield
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{path}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
