"""The weights in a Hugging Face folder, in one file or in shards with an index.

model*.safetensors(.index.json)     read and written
pytorch_model*.bin(.index.json)     the same in torch's format, only read

Experts are read one by one, also from the tensors in which transformers 5 can write all of a layer.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from pose_megatron.checkpoints.mapping import ParamMapping
from pose_megatron.checkpoints.stored_weights import StoredWeights
from pose_megatron.checkpoints.tensor_files import (
    SafetensorsWriter,
    Stored,
    read_safetensors,
    read_torch,
    size,
)
from pose_megatron.errors import ConfigError, DamagedCheckpoint
from pose_megatron.models.families.family import HFNames
from pose_megatron.runtime.json_files import read_json, write_json


class ShardedWeights(StoredWeights):
    """The weights of a folder by Hugging Face's names. Hashes are the sha256 sums that
    huggingface_hub noted when it downloaded the files.

    Args:
        stacked: the family's, see models.families.family.Family.

    Raises:
        ConfigError: a tensor does not divide into its experts.
        DamagedCheckpoint: there are no weights, or a shard is missing, damaged or incomplete.
    """

    def __init__(self, folder: Path, stacked: Mapping[str, HFNames] = MappingProxyType({})):
        super().__init__()
        single_file, index = _find(folder)
        weight_map, total = _read_index(index) if index.is_file() else ({}, None)
        read = read_safetensors if single_file.endswith("safetensors") else read_torch
        self._tensors: dict[str, Stored] = {}
        for shard in sorted(set(weight_map.values())) or [single_file]:
            path = folder / shard
            if path.parent != folder or not path.is_file():
                raise DamagedCheckpoint(f"{folder}: shard {shard} is missing")
            tensors = read(path)
            if twice := tensors.keys() & self._tensors.keys():
                raise DamagedCheckpoint(f"{path} has {min(twice)}, which another shard has too")
            self._tensors |= tensors
            if digest := _downloaded_hash(folder, shard):
                self.hashes[path] = ("sha256", digest)
        for name, shard in weight_map.items():
            if name not in self._tensors or self._tensors[name].path != folder / shard:
                raise DamagedCheckpoint(
                    f"{folder}: shard {shard} lacks {name}, which {index.name} says it has"
                )
        found = sum(stored.nbytes for stored in self._tensors.values())
        if total not in (None, found):
            self.warnings.append(f"{index} says {total} bytes of tensors, the shards have {found}")
        for name, names in stacked.items():
            self._unstack(re.compile(re.escape(name).replace(r"\{\}", r"(\d+)")), names)
        self.shapes = {name: stored.shape for name, stored in self._tensors.items()}
        self.dtypes = {name: stored.dtype for name, stored in self._tensors.items()}

    def _unstack(self, pattern: re.Pattern, names: HFNames) -> None:
        """Puts tensors of single experts in the place of those whose names match."""
        parts = (names,) if isinstance(names, str) else names
        matches = [match for name in self._tensors if (match := pattern.fullmatch(name))]
        for whole, layer in ((match[0], match[1]) for match in matches):
            stored = self._tensors.pop(whole)
            if parts[0].count("{}") == 1:  # another name only
                self._tensors[parts[0].format(layer)] = stored
                continue
            if len(stored.shape) != 3 or stored.shape[1] % len(parts):
                raise ConfigError(
                    f"{stored.path}: tensor {whole} has shape {stored.shape}, which is not "
                    f"[experts, {len(parts)} x rows, columns]"
                )
            rows = stored.shape[1] // len(parts)
            for number in range(stored.shape[0] * len(parts)):
                expert, part = divmod(number, len(parts))
                self._tensors[parts[part].format(layer, expert)] = dataclasses.replace(
                    stored,
                    offset=stored.offset + number * rows * stored.shape[2] * stored.dtype.itemsize,
                    shape=(rows, stored.shape[2]),
                )

    def rename(self, name: str, new: str) -> None:
        """Gives a tensor another name."""
        self._tensors[new] = self._tensors.pop(name)
        self.shapes[new], self.dtypes[new] = self.shapes.pop(name), self.dtypes.pop(name)

    def read(self, name: str, pieces: Sequence[Tensor]) -> None:
        self._tensors[name].read(*pieces)


def _find(folder: Path) -> tuple[str, Path]:
    """Name of a single weights file, and path of the index that shards have in its place."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file() or (folder / name).is_file():
            return name, index
    raise DamagedCheckpoint(
        f"{folder}: no weights are here: neither model.safetensors, "
        "model.safetensors.index.json, nor pytorch_model.bin with its own"
    )


def _read_index(path: Path) -> tuple[dict[str, str], int | None]:
    """Shards by tensor name, and all tensors' bytes where the index says them."""
    content = read_json(path, DamagedCheckpoint)
    weight_map, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(weight_map, dict):
        raise DamagedCheckpoint(f"{path} has no weight_map")
    if wrong := [shard for shard in weight_map.values() if not isinstance(shard, str)]:
        raise DamagedCheckpoint(f"{path}: weight_map names no file but {wrong[0]!r}"[:200])
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _downloaded_hash(folder: Path, file: str) -> str | None:
    """huggingface_hub's note of a downloaded file: commit, etag, time. A large file's etag is its
    sha256."""
    note = folder / ".cache" / "huggingface" / "download" / f"{file}.metadata"
    lines = note.read_text(encoding="utf-8", errors="replace").split() if note.is_file() else []
    found = [line for line in lines if re.fullmatch("[0-9a-f]{64}", line)]
    return found[0] if found else None


def plan(
    mappings: Sequence[ParamMapping], itemsizes: Mapping[str, int], limit: int
) -> list[list[ParamMapping]]:
    """Mappings in their order, a new shard where `limit` bytes would be exceeded.

    Args:
        itemsizes: bytes per value of each mapping's tensor, by its name.
    """
    shards: list[list[ParamMapping]] = [[]]
    filled = 0
    for mapping in mappings:
        values = sum(math.prod(shape) for shape in mapping.parts.values())
        nbytes = values * itemsizes[mapping.name]
        if shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(mapping)
        filled += nbytes
    return shards


def name_of(number: int, count: int) -> str:
    """File name of shard `number`, counted from 0, among `count`."""
    part = f"-{number + 1:05d}-of-{count:05d}" if count > 1 else ""
    return f"model{part}.safetensors"


def create(
    path: Path, mappings: Sequence[ParamMapping], dtypes: Mapping[str, torch.dtype]
) -> SafetensorsWriter:
    """A file for the parts of some mappings; dtypes by the mappings' names."""
    return SafetensorsWriter(
        path,
        {
            part: (dtypes[mapping.name], shape)
            for mapping in mappings
            for part, shape in mapping.parts.items()
        },
    )


def write_index(
    folder: Path, shards: Sequence[Sequence[ParamMapping]], dtypes: Mapping[str, torch.dtype]
) -> None:
    """Writes the index of several shards; a single one has none."""
    if len(shards) == 1:
        return
    weight_map: dict[str, str] = {}
    total = 0
    for number, mappings in enumerate(shards):
        for mapping in mappings:
            weight_map |= dict.fromkeys(mapping.parts, name_of(number, len(shards)))
            total += sum(size(dtypes[mapping.name], shape) for shape in mapping.parts.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
