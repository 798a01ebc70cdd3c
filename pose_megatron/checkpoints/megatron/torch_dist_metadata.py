"""The index of a torch_dist checkpoint: .metadata, a pickle of classes of
torch.distributed.checkpoint.

It is read without trusting what it names, and read and written without importing those classes,
which would take longer than converting a small model.
"""

import io
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pose_megatron.errors import ConfigError, DamagedCheckpoint, gist
from pose_megatron.runtime.json_files import read_json


@dataclass(frozen=True)
class ChunkLocation:
    """Where a chunk (a box) of a stored tensor lies: `length` bytes at `offset` of a file.

    Attributes:
        key: the stored tensor's name. A tensor of the layers has the layer as its first axis, one
            of the experts also the expert as its second.
        corner: the chunk's first index along each axis.
    """

    key: str
    corner: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the index; its first `numbered_axes` are numbers of layers and experts."""

    size: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[ChunkLocation]


@dataclass(frozen=True)
class Index:
    """What .metadata says.

    Attributes:
        tensors: by their keys.
        objects: file, offset and length of everything else, by key.
    """

    tensors: dict[str, StoredTensor]
    objects: dict[str, tuple[str, int, int]]


def numbered_axes(key: str) -> int:
    """How many axes of a stored tensor are numbers: of its layer, and of its expert in it."""
    layer = key.removeprefix("decoder.layers.")
    return (layer != key and not layer[0].isdecimal()) + (".mlp.experts.experts." in key)


def write_index(
    path: Path,
    chunks: Iterable[ChunkLocation],
    layers: int,
    objects: Iterable[str],
    file: Path,
    experts: int = 0,
) -> None:
    """Writes .metadata.

    Args:
        path: the iteration's folder.
        chunks: whole tensors, or one layer of them, or one expert of a layer.
        layers, experts: the sizes of these axes.
        objects: keys of what is no tensor; `file` holds all of them as one object.
    """
    tensors: dict[str, Any] = {}
    storage = {}
    for chunk in chunks:
        axes = numbered_axes(chunk.key)
        size = torch.Size(((layers, experts)[:axes]) + chunk.shape[axes:])
        tensor = tensors.setdefault(
            chunk.key, _Tensor(properties=_Properties(dtype=chunk.dtype), size=size, chunks=[])
        )
        corner = torch.Size(chunk.corner)
        tensor.chunks.append(_Box(offsets=corner, sizes=torch.Size(chunk.shape)))
        storage[_Key(fqn=chunk.key, offset=corner, index=None)] = _File(
            relative_path=chunk.file, offset=chunk.offset, length=chunk.length
        )
    for key in objects:
        tensors[key] = _Bytes()
        storage[_Key(fqn=key, offset=None, index=None)] = _File(
            relative_path=file.name, offset=0, length=file.stat().st_size
        )
    with open(path / ".metadata", "wb") as out:
        _Namer(out, protocol=4).dump(
            _Metadata(
                state_dict_metadata=tensors,
                planner_data=None,
                storage_data=storage,
                storage_meta=None,
                version=None,
            )
        )


class Part(io.RawIOBase):
    """`length` bytes of a file from `start` on, as a file."""

    def __init__(self, file, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer) -> int:
        self._file.seek(self._start + self._at)
        content = self._file.read(min(len(buffer), max(self._length - self._at, 0)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


class _StandIn:
    """Pickled as an object of torch's class of the same name."""

    module = "torch.distributed.checkpoint.metadata"

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


_Metadata, _Tensor, _Bytes, _Box, _Key = (
    type(name, (_StandIn,), {})
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "MetadataIndex",
    )
)
_File = type("_StorageInfo", (_StandIn,), {"module": "torch.distributed.checkpoint.filesystem"})
_Format = type(
    "_MEM_FORMAT_ENCODING", (_StandIn,), {"__reduce__": lambda self: (type(self), (0,))}
)  # contiguous
_Properties = type(
    "TensorProperties",
    (_StandIn,),
    {  # dtype, layout, grad, format, pinned
        "__getstate__": lambda self: (self.dtype, torch.strided, False, _Format(), False)
    },
)
# The pickler written in C imports every class; typeshed leaves out the one written in Python.
_Pickler: Any = pickle._Pickler


class _Namer(_Pickler):
    """Writes a stand-in's class as torch's, by name."""

    def save_global(self, obj, name=None) -> None:
        if not (isinstance(obj, type) and issubclass(obj, _StandIn)):
            return super().save_global(obj, name)
        self.save(obj.module)
        self.save(obj.__name__)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)


# What .metadata names. Of the latter modules every class may be named: megatron-core 0.12 to 0.15
# kept its plans for saving there, too.
_TORCH = {"Size", "serialization._get_layout", "serialization._get_memory_format"}
_INERT = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")


class _Plain(pickle.Unpickler):
    """Unpickles .metadata into plain values and inert objects with attributes.

    No class or function that the file names is ever called, and torch.distributed.checkpoint need
    not be imported. A name that no checkpoint needs is refused.
    """

    def find_class(self, module: str, name: str):
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        known = f"{module}.{name}".removeprefix("torch.") in _TORCH
        if known or f"{module}.".startswith(_INERT):
            return type(name, (_Inert,), {})
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


class _Inert:
    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)
        elif isinstance(state, tuple) and state and isinstance(state[0], torch.dtype):
            self.dtype = state[0]  # TensorProperties'


def read_index(path: Path) -> Index:
    """The index of an iteration's folder.

    Raises:
        ConfigError: the checkpoint is not in the torch_dist format.
        DamagedCheckpoint: metadata.json or .metadata is damaged.
    """
    try:
        backend = read_json(path / "metadata.json").get("sharded_backend")
    except ConfigError as error:
        raise _damaged(path / "metadata.json", error) from None
    if backend != "torch_dist":
        raise ConfigError(
            f"checkpoint {path}: sharded_backend {backend!r} is not supported, only 'torch_dist' "
            "is; save it anew with --ckpt-format torch_dist first"
        )
    return read_metadata(path / ".metadata")


def read_metadata(file: Path) -> Index:
    """The index that a .metadata file is.

    Raises:
        DamagedCheckpoint: it is damaged, or names what no checkpoint needs.
    """
    try:
        with open(file, "rb") as opened:
            return _index(_Plain(opened).load())
    except Exception as error:  # damaged bytes raise errors of many classes
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"checkpoint {file.parent} cannot be loaded: {file.name} is damaged ({gist(error)})"
    )


def _index(metadata: Any) -> Index:
    """From torch's Metadata, unpickled by _Plain."""
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, tuple[str, int, int]] = {}
    shapes: dict[tuple, tuple[int, ...]] = {}
    for key, tensor in metadata.state_dict_metadata.items():
        if not hasattr(tensor, "chunks"):  # not a tensor but an object: BytesStorageMetadata
            continue
        tensors[key] = StoredTensor(tensor.size, tensor.properties.dtype, [])
        shapes |= {(key, chunk.offsets): chunk.sizes for chunk in tensor.chunks}
    for where, info in metadata.storage_data.items():
        if Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"{info.relative_path} is no file of its folder")
        if where.fqn not in tensors:
            objects[where.fqn] = (info.relative_path, info.offset, info.length)
        elif (shape := shapes.get((where.fqn, where.offset))) is not None:
            tensor = tensors[where.fqn]
            tensor.chunks.append(
                ChunkLocation(
                    where.fqn,
                    where.offset,
                    shape,
                    tensor.dtype,
                    info.relative_path,
                    info.offset,
                    info.length,
                )
            )
    for key, tensor in tensors.items():
        _check_chunks(key, tensor)
    return Index(tensors, objects)


def _check_chunks(key: str, tensor: StoredTensor) -> None:
    """That the chunks fill the tensor, so that loading leaves no part of it as it was."""
    corners, filled = set(), 0
    for chunk in tensor.chunks:
        places = zip(chunk.corner, chunk.shape, tensor.size, strict=True)
        if any(corner < 0 or corner + n > size for corner, n, size in places):
            raise ValueError(f"a chunk of {key} lies outside it")
        if (
            chunk.length < torch.Size(chunk.shape).numel() * chunk.dtype.itemsize
            or chunk.offset < 0
        ):
            raise ValueError(f"a chunk of {key} is longer than what is stored")
        corners.add(chunk.corner)
        filled += torch.Size(chunk.shape).numel()
    if len(corners) != len(tensor.chunks) or filled != torch.Size(tensor.size).numel():
        raise ValueError(f"{key} is stored only in part")
