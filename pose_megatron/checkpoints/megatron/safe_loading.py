"""Has torch.distributed.checkpoint read a checkpoint without running what is pickled in it.

torch's reader takes .metadata through a plain pickle.load, and objects among the tensors through
torch.load(weights_only=False); both run whatever code a file names. megatron-core calls that reader
inside and takes no other, so while `safe_loading` lasts these methods of torch's classes are
replaced: .metadata is read as everywhere here (torch_dist_metadata.py), objects through torch's own
allow-list, to which megatron-core adds the classes of a common state. Checksums (checksums.py) are
compared on the way.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo

from pose_megatron.checkpoints.checksums import check, enabled
from pose_megatron.checkpoints.megatron.torch_dist_metadata import Index, Part, read_metadata
from pose_megatron.errors import DamagedCheckpoint, gist

_TRUSTING = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # which would have torch.load unpickle anything


@contextlib.contextmanager
def safe_loading() -> Iterator[None]:
    """While it lasts, torch's and megatron-core's loading runs no code of a checkpoint."""
    before = [(kind, name, getattr(kind, name)) for kind, name, _ in _REPLACED]
    trusting = os.environ.pop(_TRUSTING, None)
    load_safely()
    FileSystemReader.read_data = _read_data  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, name, method in before:
            setattr(kind, name, method)
        FileSystemReader.read_data = _theirs  # type: ignore[method-assign]
        if trusting is not None:
            os.environ[_TRUSTING] = trusting


def load_safely() -> None:
    """The same for as long as the process lasts, for a program whose loading is not ours."""
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()
    for kind, name, method in _REPLACED:
        setattr(kind, name, method)


def _read_metadata(self, *args, **kwargs) -> dcp.Metadata:
    """In place of FileSystemReader's."""
    rank = kwargs.get("rank")
    index = read_metadata(Path(self.path) / (".metadata" if rank is None else f"__{rank}.metadata"))
    metadata = _as_torch(index)
    metadata.storage_meta = dcp.StorageMeta(load_id=self.load_id)
    return metadata


def _load_bytes(self, read_item, value) -> None:
    """In place of DefaultLoadPlanner's."""
    name = read_item.dest_index.fqn
    try:
        found = torch.load(value, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise errors of many classes
        raise DamagedCheckpoint(f"{name} cannot be read ({gist(error)})") from None
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], found)
    else:
        self.state_dict[name] = found


def _read_data(self, plan, planner):
    """In place of FileSystemReader's: checksums are compared meanwhile, in a thread."""
    if not enabled():
        return _theirs(self, plan, planner)
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(_check, Path(self.path), self.storage_data, plan.items)
        try:
            return _theirs(self, plan, planner)
        finally:
            checked.result()  # says more of damage than what torch made of it


def _check(path: Path, places: Mapping, items: Iterable) -> None:
    """Holds what a rank reads to its checksums; several items may lie in one archive."""
    for where in {item.storage_index for item in items}:
        place = places[where]
        with open(path / place.relative_path, "rb") as file:
            part: Any = Part(file, place.offset, place.length)
            check(part, f"{where.fqn} in {place.relative_path}")


_theirs = FileSystemReader.read_data
_REPLACED = [
    (FileSystemReader, "read_metadata", _read_metadata),
    (DefaultLoadPlanner, "load_bytes", _load_bytes),
]


def _as_torch(index: Index) -> dcp.Metadata:
    """The index as an object of torch's, made anew: nothing of the file's own is left in it."""
    size = torch.Size
    tensors: dict[str, dcp.STORAGE_TYPES] = {
        key: dcp.BytesStorageMetadata() for key in index.objects
    }
    storage = {
        dcp.MetadataIndex(key): _StorageInfo(file, offset, length)
        for key, (file, offset, length) in index.objects.items()
    }
    for key, tensor in index.tensors.items():
        tensors[key] = dcp.TensorStorageMetadata(
            dcp.TensorProperties(dtype=tensor.dtype),
            size(tensor.size),
            [dcp.ChunkStorageMetadata(size(c.corner), size(c.shape)) for c in tensor.chunks],
        )
        for c in tensor.chunks:
            where = dcp.MetadataIndex(key, size(c.corner))
            storage[where] = _StorageInfo(c.file, c.offset, c.length)
    return dcp.Metadata(tensors, storage_data=storage)
