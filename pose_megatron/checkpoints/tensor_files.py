"""Tensors inside files: where each lies, and how its bytes are read and written.

Headers are read when a file is opened, bytes on demand, with preadv into the caller's buffer and
pwritev out of it. No file is mapped: memory is what the caller allocates, however large the file,
and a damaged disk ends in an error message instead of SIGBUS. Files of torch.save are unpickled
with `weights_only=True`, onto no device.
"""

import json
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Self

import torch
from torch import Tensor

from pose_megatron.checkpoints.checksums import Record, records
from pose_megatron.errors import ConfigError, DamagedCheckpoint, gist
from pose_megatron.runtime.lfs_pointers import refuse_lfs_pointer

_DTYPES = {  # by safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_BELOW_A_BYTE = ("F4", "F6_E2M3", "F6_E3M2")  # safetensors has them, preadv has no place for them
# What weights are converted from and to. Of all others, the numbers alone do not say the weights:
# they need scales, in one of many layouts.
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_VIEWS = 1024  # buffers that one preadv or pwritev takes, on Linux and others
_LARGEST_HEADER = 1 << 25  # bytes: some 300,000 tensors


@dataclass(frozen=True)
class Stored:
    """A contiguous tensor at `offset` bytes in a file.

    Attributes:
        name: for messages.
        record: what holds it, where that has a checksum.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str = field(default="", compare=False)
    record: Record | None = field(default=None, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        return size(self.dtype, self.shape)

    def read(self, *out: Tensor) -> None:
        """Fills contiguous tensors of this dtype, one after the other.

        Raises:
            DamagedCheckpoint: the file ends too early, or its bytes have changed.
        """
        if self.record:
            self.record.check(self.name)
        with open(self.path, "rb", buffering=0) as file:
            if not _transfer(os.preadv, file.fileno(), out, self.offset):
                size = os.fstat(file.fileno()).st_size
                raise DamagedCheckpoint(f"{self.path} is cut off: it ends at byte {size}")


def not_convertible(what: str, dtype: str) -> ConfigError:
    """The error for weights that are no plain floating-point numbers."""
    return ConfigError(
        f"{what} is stored as {dtype}, and quantized weights are not converted; save the model in "
        "bfloat16 first, with the tool that quantized it"
    )


def size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a contiguous tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def data(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name.

    Raises:
        DamagedCheckpoint: its header is damaged, or it is not as long as the header says.
        ConfigError: a tensor has less than a byte for a value.
    """
    refuse_lfs_pointer(path, DamagedCheckpoint)
    length = path.stat().st_size
    with open(path, "rb") as file:
        (header,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if header > min(_LARGEST_HEADER, length - 8):
            raise DamagedCheckpoint(
                f"{path} is damaged or cut off: its header does not fit into it"
            )
        try:
            entries = json.loads(file.read(header))
            entries.pop("__metadata__", None)
            for name, entry in entries.items():
                if entry["dtype"] in _BELOW_A_BYTE:
                    raise not_convertible(f"{path}: tensor {name}", entry["dtype"])
                begin, end = entry["data_offsets"]
                numbers = [begin, end, *entry["shape"]]
                if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
                    raise ValueError(f"wrong numbers {numbers}"[:200])
            found = {
                name: Stored(
                    path,
                    8 + header + entry["data_offsets"][0],
                    _DTYPES[entry["dtype"]],
                    tuple(entry["shape"]),
                )
                for name, entry in entries.items()
            }
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedCheckpoint(
                f"{path} is damaged: header unreadable ({gist(error)})"
            ) from None
    end = 8 + header
    for stored in sorted(found.values(), key=lambda stored: stored.offset):
        if stored.offset != end:
            raise DamagedCheckpoint(f"{path} is damaged: a gap or an overlap at byte {end}")
        end += stored.nbytes
    if end != length:
        raise DamagedCheckpoint(
            f"{path} is damaged or cut off: {length} bytes, its header says {end}"
        )
    return found


def read_torch(path: Path) -> dict[str, Stored]:
    """The tensors of a dict that torch.save wrote, by name.

    Raises:
        DamagedCheckpoint: the file is damaged, or holds more than tensors; damage to a tensor's
            own bytes is found when it is read.
        ConfigError: it holds no tensors by name, or was written by torch before 1.6.
    """
    refuse_lfs_pointer(path, DamagedCheckpoint)
    try:
        tensors = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # damaged bytes raise errors of many classes
        raise DamagedCheckpoint(
            f"{path} is damaged, or holds more than tensors: {gist(error)}"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ConfigError(f"{path} does not hold tensors by name")
    by_begin = records(path)
    found = {}
    for name, tensor in tensors.items():
        stored = locate(path, name, tensor)
        begin = stored.offset - tensor.storage_offset() * tensor.dtype.itemsize
        found[name] = replace(stored, name=name, record=by_begin.get(begin))
    return found


def locate(path: Path, name: str, tensor: Tensor, base: int = 0) -> Stored:
    """Where a tensor lies in a file from which it was loaded onto the meta device.

    Args:
        base: byte at which torch's archive begins in the file.
    """
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise ConfigError(f"{path} is in torch's format of before 1.6; load and save it anew first")
    if not tensor.is_contiguous():
        raise ConfigError(
            f"{path}: {name} is not stored contiguously; save a contiguous copy first"
        )
    offset += base + tensor.storage_offset() * tensor.dtype.itemsize
    return Stored(path, offset, tensor.dtype, tuple(tensor.shape))


class OutputFile(ABC):
    """A file that is being written. Leaving its `with` block calls close(), or, after an error,
    only closes the file."""

    _file: IO[bytes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind:
            self._file.close()
        else:
            self.close()

    @abstractmethod
    def close(self) -> None:
        """Completes the file and puts it on disk."""


class SafetensorsWriter(OutputFile):
    """A safetensors file whose tensors are put one by one, in any order.

    Args:
        tensors: dtype and shape of every tensor, by name.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for name, (dtype, shape) in tensors.items():
            end = begin + size(dtype, shape)
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
            begin = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        self._missing = {
            name: (base + header[name]["data_offsets"][0], *tensors[name]) for name in tensors
        }
        self._file = open(path, "xb", buffering=0)
        start = bytearray(struct.pack("<Q", len(text)) + text)
        write_at(self._file.fileno(), 0, torch.frombuffer(start, dtype=torch.uint8))

    def put(self, name: str, *pieces: Tensor) -> None:
        """Writes a tensor, given as contiguous pieces whose rows follow each other."""
        offset, dtype, shape = self._missing.pop(name)
        assert {(piece.dtype, piece.shape[1:]) for piece in pieces} == {(dtype, shape[1:])}, name
        assert sum(piece.numel() for piece in pieces) == torch.Size(shape).numel(), name
        write_at(self._file.fileno(), offset, *pieces)

    def close(self) -> None:
        """Puts the file on disk; every tensor must have been put."""
        assert not self._missing, f"never put: {', '.join(self._missing)}"
        os.fsync(self._file.fileno())
        self._file.close()


def write_at(handle: int, offset: int, *tensors: Tensor) -> None:
    """Writes contiguous tensors one after the other, from byte `offset` on."""
    _transfer(os.pwritev, handle, tensors, offset)


def _transfer(call: Callable, handle: int, tensors: Iterable[Tensor], offset: int) -> bool:
    """Moves bytes between a file and tensors with preadv or pwritev; False where the file ends too
    early."""
    views = [view for view in map(data, tensors) if view]
    while views:
        if not (count := call(handle, views[:_MOST_VIEWS], offset)):
            return False
        offset += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
    return True
