"""Tables about a corpus that are made once and then shared, memory-mapped, by all who need them.

A cache entry is a folder named by a hash of what its arrays are computed from. It is written under
another name, flushed and renamed, so an entry is whole or not there: two jobs, or two nodes of one
job, may start together on the same folder, and the slower one takes what the quicker one made.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pose_megatron.errors import ConfigError
from pose_megatron.runtime.atomic_files import fsync
from pose_megatron.runtime.json_files import read_json

FORMAT = 1  # goes up when an array changes its meaning


def cached(
    folder: str | None, identity: dict, build: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays that `build` makes: read from the cache, or made and put there.

    Args:
        folder: --data-cache-path; None builds in memory.
        identity: plain values that determine the arrays.

    Raises:
        ConfigError: the folder cannot be written, or an entry is damaged.
    """
    if folder is None:
        return build()
    words = json.dumps([FORMAT, identity], sort_keys=True)
    name = hashlib.sha256(words.encode()).hexdigest()[:32]
    entry = Path(folder) / name
    if not entry.is_dir():
        _write(entry, identity, build())
    try:
        names = read_json(entry / "entry.json")["arrays"]
        return {name: _load(entry / f"{name}.npy") for name in names}
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise ConfigError(
            f"--data-cache-path {folder}: {entry} is damaged ({error}); delete that folder"
        ) from None


def _load(path: Path) -> np.ndarray:
    empty = path.stat().st_size <= 128  # a header alone cannot be mapped
    return np.load(path, mmap_mode=None if empty else "r", allow_pickle=False)


def _write(entry: Path, identity: dict, arrays: dict[str, np.ndarray]) -> None:
    draft = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.tmp")
    try:
        draft.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(draft / f"{name}.npy", array, allow_pickle=False)
        description = {"identity": identity, "arrays": list(arrays)}
        (draft / "entry.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
        for path in draft.iterdir():
            fsync(path)
        try:
            os.rename(draft, entry)
        except OSError:
            if not entry.is_dir():
                raise
            # Another job was quicker; its arrays are the same.
    except OSError as error:
        raise ConfigError(
            f"--data-cache-path {entry.parent}: cannot write there ({error})"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
