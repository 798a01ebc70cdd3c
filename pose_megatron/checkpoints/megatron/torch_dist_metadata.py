"""The index of a torch_dist checkpoint: .metadata, a pickle of classes of
torch.distributed.checkpoint.

Here it is read without trusting what it names, and read and written without importing those
classes, which takes longer than to convert a small model.
"""

import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from pose_megatron.errors import DamagedCheckpoint
from pose_megatron.runtime.atomic_files import gist


@dataclass(frozen=True)
class Place:
    """Where a box of a tensor is: `length` bytes at `offset` of a file.

    Attributes:
        key: the tensor's; that of a layer's tensor stands for all layers, which are its first axis.
        corner, shape: of the box.
    """

    key: str
    corner: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    offset: int
    length: int


def write_index(
    path: Path, places: Iterable[Place], layers: int, objects: Iterable[str], file: Path
) -> None:
    """Writes .metadata.

    Args:
        path: the iteration's folder.
        places: whole tensors, or one layer of them.
        layers: how many a layer's tensor has.
        objects: keys of what is no tensor; `file` holds them all at once.
    """
    tensors, storage = {}, {}
    for p in places:
        layer = p.key.startswith("decoder.layers.")
        size = torch.Size((layers, *p.shape[1:]) if layer else p.shape)
        tensor = tensors.setdefault(
            p.key, _Tensor(properties=_Properties(dtype=p.dtype), size=size, chunks=[])
        )
        corner = torch.Size(p.corner)
        tensor.chunks.append(_Box(offsets=corner, sizes=torch.Size(p.shape)))
        storage[_Key(fqn=p.key, offset=corner, index=None)] = _File(
            relative_path=p.file, offset=p.offset, length=p.length
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


class _StandIn:
    """An object whose class the pickle says to be one of torch's, of the same name."""

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


class _Namer(pickle._Pickler):  # the one written in C imports every class
    def save_global(self, obj, name=None) -> None:
        if not (isinstance(obj, type) and issubclass(obj, _StandIn)):
            return super().save_global(obj, name)
        self.save(obj.module)
        self.save(obj.__name__)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)


class _Plain(pickle.Unpickler):
    """Unpickles .metadata into plain values and objects that have attributes and do nothing.

    No class or function that the file names is ever called, and torch.distributed.checkpoint, whose
    classes they are, need not be imported.
    """

    def find_class(self, module: str, name: str):
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) == ("torch", "Size"):
            return tuple
        return type(name, (_Inert,), {})


class _Inert:
    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)
        elif isinstance(state, tuple) and state and isinstance(state[0], torch.dtype):
            self.dtype = state[0]  # of TensorProperties


def read_index(path: Path):
    """.metadata, and of each chunk its shape by (key, corner)."""
    try:
        name = "metadata.json"
        backend = json.loads((path / name).read_text())
        if backend.get("sharded_backend") != "torch_dist":
            raise DamagedCheckpoint(
                f"sharded_backend {backend.get('sharded_backend')!r} is not supported"
            )
        name = ".metadata"
        with open(path / name, "rb") as file:
            index = _Plain(file).load()
        index.chunk_sizes = {
            (key, chunk.offsets): chunk.sizes
            for key, tensor in index.state_dict_metadata.items()
            for chunk in getattr(tensor, "chunks", ())
        }
        index.storage_data.items()
    except Exception as error:  # of many classes, for damaged bytes
        raise DamagedCheckpoint(
            f"checkpoint {path} cannot be loaded: {name} is damaged ({gist(error)})"
        ) from None
    return index
