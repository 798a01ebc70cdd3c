"""Undivided tensors in and out of a torch_dist checkpoint, one by one: what conversion works on.

    .metadata        pickle: each stored tensor's dtype, size and chunks, and where each chunk lies
    __R_N.distcp     chunks end to end, each as torch.save writes one tensor

Names are those of an undivided model; in the checkpoint, the layer is a leading axis, and of a
mixture of experts the expert the next; where moe_layer_freq is a list, megatron-core keeps the
layers apart, which is read too. Experts pass one by one, as all tensors do. What a
training run saved in any layout of ranks is read without ranks, a GPU or megatron-core, and what is
written here loads in every layout. The optimizer's tensors are passed over.
"""

import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pose_megatron.checkpoints import checksums
from pose_megatron.checkpoints.mapping import scatter
from pose_megatron.checkpoints.megatron.args import common_state
from pose_megatron.checkpoints.megatron.directory import (
    Checkpoint,
    content_metadata,
    copy_tokenizer,
    find,
    forget,
    path_of,
    publish,
)
from pose_megatron.checkpoints.megatron.hybrid_layout import gpt_name, is_hybrid
from pose_megatron.checkpoints.megatron.legacy import LegacyWeights
from pose_megatron.checkpoints.megatron.torch_dist_metadata import (
    ChunkLocation,
    Part,
    numbered_axes,
    read_index,
    write_index,
)
from pose_megatron.checkpoints.stored_weights import StoredWeights
from pose_megatron.checkpoints.tensor_files import OutputFile, Stored, data, locate
from pose_megatron.errors import DamagedCheckpoint, gist
from pose_megatron.models.shape import ModelConfig
from pose_megatron.runtime.atomic_files import fsync

# The numbers of layer and expert in a name, which are axes in the checkpoint.
_NUMBERED = re.compile(r"^(decoder\.layers\.)(\d+)\.(?:(mlp\.experts\.experts\.)(\d+)\.)?")
_EXPERTS = "decoder.layers.mlp.experts.experts."
# The norm before a mixture of experts as Transformer Engine's layer spec stores it, and as
# megatron-core's own, which takes it for a part of a dense MLP.
EXPERTS_NORM, LOCAL_EXPERTS_NORM = "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
_EXTRA_ATTENTION = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
)
_EXTRA_HEAD_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class TorchDistWeights(StoredWeights):
    """The weights of an iteration by the names of an undivided GPTModel.

    Attributes:
        is_hybrid: whether they are stored in HybridModel's layout.

    Args:
        path: the iteration's folder.

    Raises:
        ConfigError: the checkpoint is not in the torch_dist format.
        DamagedCheckpoint: a file is missing or damaged.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self._chunks: dict[str, list[ChunkLocation]] = {}
        self._checked: set[tuple[str, int]] = set()
        sizes: dict[Path, int] = {}
        tensors = read_index(path).tensors
        if any("mlp.router.weight" in key for key in tensors):
            for key in [key for key in tensors if key.endswith(LOCAL_EXPERTS_NORM)]:
                norm = tensors.pop(key)
                tensors.setdefault(key.replace(LOCAL_EXPERTS_NORM, EXPERTS_NORM), norm)
        self.is_hybrid = is_hybrid(tensors)
        for key, tensor in tensors.items():
            if key.startswith(("optimizer.", "rng_state")):
                continue
            axes = numbered_axes(key)
            for numbers in itertools.product(*map(range, tensor.size[:axes])):
                name = self._name(key, numbers)
                self.shapes[name], self.dtypes[name] = tensor.size[axes:], tensor.dtype
                self._chunks[name] = []
            for chunk in tensor.chunks:
                self._check_file(chunk, sizes)
                ends = (a + n for a, n in zip(chunk.corner, chunk.shape, strict=True))
                spans = [range(a, b) for a, b in zip(chunk.corner, ends, strict=True)]
                for numbers in itertools.product(*spans[:axes]):
                    self._chunks[self._name(key, numbers)].append(chunk)

    def _name(self, key: str, numbers: Sequence[int]) -> str:
        """The name in an undivided GPTModel, from a key and the numbers along its first axes."""
        name = _numbered(key, numbers)
        return gpt_name(name) if self.is_hybrid else name

    def _check_file(self, chunk: ChunkLocation, sizes: dict[Path, int]) -> None:
        """That a chunk's file is there and long enough; `sizes` remembers what was asked before."""
        damaged, file = f"checkpoint {self.path} cannot be loaded:", self.path / chunk.file
        if file not in sizes:
            if file.parent != self.path or not file.is_file():
                raise DamagedCheckpoint(f"{damaged} {file.name} is missing")
            sizes[file] = file.stat().st_size
        if sizes[file] < chunk.offset + chunk.length:
            raise DamagedCheckpoint(f"{damaged} {file.name} is cut off")

    def read(self, name: str, pieces: Sequence[Tensor]) -> None:
        if len(pieces) > 1:
            return scatter(self[name], pieces)
        (out,) = pieces
        chunks, numbers = self._chunks[name], _split_numbers(name)[1]
        if chunks:  # where every layer has a key of its own, only the expert is an axis
            numbers = numbers[len(numbers) - len(chunks[0].corner) + out.dim() :]
        # The part of the stored tensor that `out` is: [start, end) along every axis.
        box = out[(None,) * len(numbers)]
        start = [*numbers] + [0] * out.dim()
        end = [a + n for a, n in zip(start, box.shape, strict=True)]
        filled = 0
        for chunk in chunks:
            chunk_end = [a + n for a, n in zip(chunk.corner, chunk.shape, strict=True)]
            low = [max(pair) for pair in zip(start, chunk.corner, strict=True)]
            high = [min(pair) for pair in zip(end, chunk_end, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            target = box[_slices(low, high, start)]
            stored = self._locate(name, chunk)
            if tuple(target.shape) == chunk.shape and target.is_contiguous():
                stored.read(target)
            else:
                stored.read(whole := torch.empty(chunk.shape, dtype=stored.dtype))
                target.copy_(whole[_slices(low, high, chunk.corner)])
            filled += target.numel()
        if filled != out.numel():
            raise DamagedCheckpoint(f"checkpoint {self.path}: {name} is stored only in part")

    def verify(self) -> None:
        super().verify()
        index = read_index(self.path)  # with the optimizer's state, and the random generators'
        places = {
            (chunk.file, chunk.offset, chunk.length): chunk.key
            for tensor in index.tensors.values()
            for chunk in tensor.chunks
        }
        places |= {place: key for key, place in index.objects.items()}
        for (name, offset, length), key in places.items():
            if (name, offset) not in self._checked:
                with open(self.path / name, "rb") as file:
                    part: Any = Part(file, offset, length)
                    checksums.check(part, f"checkpoint {self.path}: {key} in {name}")

    def _locate(self, name: str, chunk: ChunkLocation) -> Stored:
        with open(self.path / chunk.file, "rb") as file:
            try:
                archive: Any = Part(file, chunk.offset, chunk.length)
                if (chunk.file, chunk.offset) not in self._checked:
                    checksums.check(archive, str(self.path / chunk.file))
                    self._checked.add((chunk.file, chunk.offset))
                    archive.seek(0)
                tensor = torch.load(archive, map_location="meta", weights_only=True)
                stored = locate(self.path / chunk.file, name, tensor, chunk.offset)
            except Exception as error:  # damaged bytes raise errors of many classes
                raise DamagedCheckpoint(
                    f"checkpoint {self.path} cannot be loaded: {chunk.file} is damaged at "
                    f"{name} ({gist(error)})"
                ) from None
        if stored.shape != chunk.shape or stored.dtype != self.dtypes[name]:
            raise DamagedCheckpoint(
                f"checkpoint {self.path}: {name} in {chunk.file} is of shape "
                f"{stored.shape}, .metadata says {chunk.shape}"
            )
        return stored


def _slices(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    """[low, high) along every axis, counted from `origin`."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


class DistcpWriter(OutputFile):
    """Writes undivided tensors into one .distcp file of a folder's `release`, one by one.

    Several processes may write a file each; the `chunks` of all of them go to `finish`.

    Args:
        root: the checkpoint folder.
        rank: the file's number.

    Attributes:
        chunks: where what was put lies.
    """

    def __init__(self, root: Path, rank: int = 0):
        self.path = path_of(Path(root), "release") / f"__{rank}_0.distcp"
        self.chunks: list[ChunkLocation] = []
        self._file = open(self.path, "xb")

    def put(self, name: str, tensor: Tensor) -> None:
        """`name`: in an undivided model, such as `decoder.layers.3.mlp.linear_fc2.weight`."""
        key, numbers = _split_numbers(name)
        begin = self._file.tell()
        tensor = tensor.contiguous()
        shape, corner = (1,) * len(numbers) + tensor.shape, numbers + (0,) * tensor.dim()
        # A storage of its own size, without a copy: torch.save would write all of a buffer's.
        alone = torch.frombuffer(data(tensor), dtype=tensor.dtype)
        try:
            torch.save(alone.view(shape), self._file)
        except RuntimeError as error:  # torch's own, over what the disk said
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        length = self._file.tell() - begin
        self.chunks.append(
            ChunkLocation(key, corner, shape, tensor.dtype, self.path.name, begin, length)
        )

    def close(self) -> None:
        self._file.flush()
        fsync(self.path)
        self._file.close()


def finish(root: Path, model: ModelConfig, chunks: Sequence[ChunkLocation]) -> None:
    """Completes the checkpoint whose tensors DistcpWriters have written; metadata.json comes last.

    Args:
        chunks: of all writers.
    """
    path = path_of(root, "release")
    # By default, stock Megatron-LM loads no checkpoint that lacks the extra state of its layers or
    # of Transformer Engine's. Here all extra state is one None, in a file of its own.
    empty = path / f"__{1 + max(int(chunk.file.split('_')[2]) for chunk in chunks)}_0.distcp"
    torch.save([None], empty)  # as megatron-core wraps an object
    fsync(empty)
    extra = _extra_state(model)
    chunks = [*chunks]
    chunks += [  # the same bytes
        dataclasses.replace(chunk, key=chunk.key.replace(EXPERTS_NORM, LOCAL_EXPERTS_NORM))
        for chunk in chunks
        if chunk.key.endswith(EXPERTS_NORM)
    ]
    write_index(path, chunks, model.num_layers, extra, empty, model.num_experts or 0)
    state = common_state(
        model,
        0,
        0,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        world_size=1,
        data_parallel_size=1,
        no_save_optim=True,
        no_save_rng=True,
        params_dtype=chunks[0].dtype,
    )
    torch.save(state | {"content_metadata": content_metadata()}, path / "common.pt")
    (path / "metadata.json").write_text(json.dumps(_BACKEND), encoding="utf-8")
    publish(root, path, "release")


def _extra_state(model: ModelConfig) -> list[str]:
    """The keys of all extra state: of each layer's modules, of each layer's experts, of the end."""
    size: dict[str, tuple[int, ...]]
    norms = _EXTRA_HEAD_NORMS if model.qk_layernorm else ()
    size = {f"decoder.layers.{part}": (model.num_layers,) for part in (*_EXTRA_ATTENTION, *norms)}
    if model.num_experts is None:
        size |= {f"decoder.layers.mlp.linear_fc{i}": (model.num_layers,) for i in (1, 2)}
    else:
        size["decoder.layers.pre_mlp_layernorm"] = (model.num_layers,)
        of_experts = (model.num_layers, model.num_experts)
        size |= {f"{_EXPERTS}linear_fc{i}": of_experts for i in (1, 2)}
    size["decoder.final_layernorm"] = (1,)
    return [
        f"{name}._extra_state/shard_{'.'.join(map(str, numbers))}_{'.'.join(map(str, sizes))}"
        for name, sizes in size.items()
        for numbers in itertools.product(*map(range, sizes))
    ]


def begin(root: Path, tokenizer_files: Iterable[Path]) -> Path:
    """An empty `release` folder for DistcpWriters; what was there is no longer found."""
    path = path_of(root, "release")
    root.mkdir(parents=True, exist_ok=True)
    if path.exists():
        forget(root, "release")
        shutil.rmtree(path)
    path.mkdir()
    copy_tokenizer(root, tokenizer_files)
    return path


def open_weights(root: str | Path, iteration: int | None = None) -> StoredWeights:
    """The weights of a folder's checkpoint; errors as `find`."""
    return weights_of(find(root, iteration))


def weights_of(checkpoint: Checkpoint) -> StoredWeights:
    """The weights of a checkpoint, in Megatron-LM's legacy layout too."""
    kind = LegacyWeights if checkpoint.is_legacy else TorchDistWeights
    return kind(checkpoint.path)


def _split_numbers(name: str) -> tuple[str, tuple[int, ...]]:
    """The stored tensor's key, and the numbers of layer and expert along its first axes."""
    if not (match := _NUMBERED.match(name)):
        return name, ()
    layers, layer, experts, expert = match.groups()
    key = layers + (experts or "") + name[match.end() :]
    return key, (int(layer),) if expert is None else (int(layer), int(expert))


def _numbered(key: str, numbers: Sequence[int]) -> str:
    """The inverse of `_split_numbers`."""
    axes = ("layers.", "experts.experts.")[-len(numbers) :] if "experts." in key else ("layers.",)
    for axis, number in zip(axes, numbers, strict=False):
        key = key.replace(axis, f"{axis}{number}.", 1)
    return key
