"""What all ranks of a checkpoint share: Megatron-LM's args, progress, the schedule.

    common.pt                  where megatron-core keeps it up to 0.18
    common_state/shard_0_1     an object among the tensors: where it keeps it from 0.19 on

A checkpoint that we save has both, so that every version loads it. Where both are, common.pt
counts, as it does for megatron-core.
"""

import argparse
import io
import pickle
from pathlib import Path

import torch

from pose_megatron.checkpoints import checksums
from pose_megatron.checkpoints.megatron.safe_globals import allow_megatron_globals
from pose_megatron.checkpoints.megatron.torch_dist_metadata import read_index
from pose_megatron.errors import DamagedCheckpoint, gist
from pose_megatron.runtime.atomic_files import fsync

FILE = "common.pt"
_OBJECT = "common_state/shard_0_1"


def read_common_state(path: Path) -> dict:
    """The common state of an iteration's folder; only plain values are unpickled.

    Raises:
        ConfigError: the checkpoint is not in the torch_dist format.
        DamagedCheckpoint: there is none, or it is damaged.
    """
    return read_plain(path, *_content(path))


def read_plain(path: Path, name: str, content: bytes) -> dict:
    """What torch.save wrote of plain values into an iteration's folder.

    Args:
        name: of its place, for messages.

    Raises:
        DamagedCheckpoint: it is damaged, or holds more than plain values.
    """
    try:
        checksums.check(io.BytesIO(content), name)
        return _unpickle(content)
    except Exception as error:  # damaged bytes raise errors of many classes
        raise DamagedCheckpoint(
            f"checkpoint {path}: {name} cannot be read ({gist(error)})"
        ) from None


def add_common_file(path: Path) -> None:
    """Writes common.pt into an iteration's folder where megatron-core has written the object only.

    A kill before it is in place leaves a checkpoint that megatron-core from 0.19 on loads.
    """
    if (path / FILE).is_file():
        return
    temporary = path / f"{FILE}.tmp"
    torch.save(read_common_state(path), temporary)
    fsync(temporary)
    temporary.replace(path / FILE)


def _content(path: Path) -> tuple[str, bytes]:
    """What is pickled, and the name of its place for messages."""
    if (path / FILE).is_file():
        return FILE, (path / FILE).read_bytes()
    place = read_index(path).objects.get(_OBJECT)
    if place is None:
        raise DamagedCheckpoint(f"checkpoint {path} is incomplete: {FILE} is missing")
    name, offset, length = place
    file = path / name
    if file.parent != path or not file.is_file():
        raise DamagedCheckpoint(f"checkpoint {path} is incomplete: {file.name} is missing")
    with open(file, "rb") as opened:
        opened.seek(offset)
        return f"{_OBJECT} in {name}", opened.read(length)


def _unpickle(content: bytes) -> dict:
    # Only what is not allowed yet: on its way out, the context manager takes back all it names.
    classes = {argparse.Namespace}.difference(torch.serialization.get_safe_globals())
    try:
        with torch.serialization.safe_globals(list(classes)):
            found = _load(content)
    except pickle.UnpicklingError:  # Megatron-LM's has some classes of megatron-core
        allow_megatron_globals()
        found = _load(content)
    if isinstance(found, list):  # megatron-core wraps an object in a list of one
        (found,) = found
    return found


def _load(content: bytes):
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
