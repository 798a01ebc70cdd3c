"""Weights in a Hugging Face folder, in one file or in shards with an index.

model*.safetensors(.index.json)     read and written
pytorch_model*.bin(.index.json)     the same in torch's format, only read
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from pose_megatron.checkpoints.huggingface.config_json import read_json, write_json
from pose_megatron.checkpoints.mapping import ParamMapping
from pose_megatron.checkpoints.tensor_files import (
    SafetensorsWriter,
    read_safetensors,
    read_torch,
    size,
)
from pose_megatron.errors import ConfigError


class Tensors(Mapping):
    """The weights of a folder by name; each is read from disk when it is asked for.

    Attributes:
        shapes, dtypes: by name, known without reading.
        hashes: sha256 of files, where huggingface_hub left a note of them when it downloaded.
        warnings: what is odd and harms nothing.

    Raises:
        ConfigError: there are no weights, or a shard is missing, damaged or incomplete.
    """

    def __init__(self, folder: Path):
        weight_map, kind = {}, None
        for kind in ("model.safetensors", "pytorch_model.bin"):
            index = folder / f"{kind}.index.json"
            if index.is_file() or (folder / kind).is_file():
                break
        else:
            raise ConfigError(
                f"{folder}: no weights are here: neither model.safetensors, "
                "model.safetensors.index.json, nor pytorch_model.bin with its own"
            )
        total = None
        if index.is_file():
            content = read_json(index)
            weight_map, total = content.get("weight_map"), content.get("metadata", {})
            if not isinstance(weight_map, dict):
                raise ConfigError(f"{index} has no weight_map")
            total = total.get("total_size") if isinstance(total, dict) else None
        read = read_safetensors if kind.endswith("safetensors") else read_torch
        self._tensors, self.hashes, self.warnings = {}, {}, []
        for shard in sorted(set(weight_map.values())) or [kind]:
            path = folder / shard
            if path.parent != folder or not path.is_file():
                raise ConfigError(f"{folder}: shard {shard} is missing")
            tensors = read(path)
            if twice := tensors.keys() & self._tensors.keys():
                raise ConfigError(f"{path} has {min(twice)}, which another shard has too")
            self._tensors |= tensors
            if digest := _downloaded_hash(folder, shard):
                self.hashes[path] = ("sha256", digest)
        for name, shard in weight_map.items():
            if name not in self._tensors or self._tensors[name].path != folder / shard:
                raise ConfigError(
                    f"{folder}: shard {shard} lacks {name}, which {index.name} says it has"
                )
        self.shapes = {name: stored.shape for name, stored in self._tensors.items()}
        self.dtypes = {name: stored.dtype for name, stored in self._tensors.items()}
        found = sum(stored.nbytes for stored in self._tensors.values())
        if total not in (None, found):
            self.warnings.append(f"{index} says {total} bytes of tensors, the shards have {found}")

    def read(self, name: str, pieces: Sequence[torch.Tensor]) -> None:
        """Fills pieces, each contiguous, with the tensor's rows one after the other."""
        self._tensors[name].read(*pieces)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        self.read(name, [tensor])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _downloaded_hash(folder: Path, file: str) -> str | None:
    """huggingface_hub's note of a downloaded file: commit, etag, time. A large file's etag is its
    sha256."""
    note = folder / ".cache" / "huggingface" / "download" / f"{file}.metadata"
    lines = note.read_text().split() if note.is_file() else []
    found = [line for line in lines if re.fullmatch("[0-9a-f]{64}", line)]
    return found[0] if found else None


def plan(
    rows: Sequence[ParamMapping], item: int | Mapping[str, int], limit: int
) -> list[list[ParamMapping]]:
    """Rows in their order, a new shard where `limit` bytes would be exceeded.

    Args:
        item: bytes of a value of each row, by its name.
    """
    shards, filled = [[]], 0
    for row in rows:
        nbytes = sum(math.prod(shape) for shape in row.parts.values()) * item[row.name]
        if shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(row)
        filled += nbytes
    return shards


def name_of(number: int, count: int) -> str:
    part = f"-{number + 1:05d}-of-{count:05d}" if count > 1 else ""
    return f"model{part}.safetensors"


def create(
    path: Path, rows: Sequence[ParamMapping], dtypes: Mapping[str, torch.dtype]
) -> SafetensorsWriter:
    """A file for the parts of some rows; dtypes by the rows' names."""
    return SafetensorsWriter(
        path, {part: (dtypes[row.name], shape) for row in rows for part, shape in row.parts.items()}
    )


def write_index(
    folder: Path, shards: Sequence[Sequence[ParamMapping]], dtypes: Mapping[str, torch.dtype]
) -> None:
    """The index of several shards; none for a single one."""
    if len(shards) == 1:
        return
    weight_map, total = {}, 0
    for number, rows in enumerate(shards):
        for row in rows:
            weight_map |= dict.fromkeys(row.parts, name_of(number, len(shards)))
            total += sum(size(dtypes[row.name], shape) for shape in row.parts.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
