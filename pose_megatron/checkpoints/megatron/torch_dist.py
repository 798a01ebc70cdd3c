"""Whole tensors in and out of a torch_dist checkpoint, one by one: what conversion works on.

    .metadata        pickle: of each key its dtype, shape and chunks, and of each chunk the place
    __R_N.distcp     chunks end to end, each as torch.save writes one tensor

Names are those of an undivided model; in the checkpoint the layer is a leading axis. What a
training run saved in any layout of ranks is read without ranks, a GPU or megatron-core, and what is
written here every layout loads. The optimizer's tensors are passed over.
"""

import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pose_megatron.checkpoints.megatron.args import common_state
from pose_megatron.checkpoints.megatron.directory import (
    content_metadata,
    copy_tokenizer,
    find,
    forget,
    path_of,
    publish,
)
from pose_megatron.checkpoints.megatron.legacy import Legacy
from pose_megatron.checkpoints.megatron.torch_dist_metadata import Place, read_index, write_index
from pose_megatron.checkpoints.tensor_files import Stored, Written, data, locate
from pose_megatron.errors import DamagedCheckpoint
from pose_megatron.models.shape import ModelConfig
from pose_megatron.runtime.atomic_files import fsync, gist

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXTRA = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class _Chunk:
    """A box of a stored tensor: `length` bytes at `offset` of a file."""

    path: Path
    offset: int
    length: int
    start: tuple[int, ...]
    shape: tuple[int, ...]


class Weights(Mapping):
    """The weights of a checkpoint by the names of an undivided model; each is read when asked for.

    Attributes:
        model: shape and rope.
        shapes, dtypes: by name, known without reading.

    Raises:
        DamagedCheckpoint: there is no such checkpoint, or it is damaged.
    """

    def __init__(self, root: str | Path, iteration: int | None = None):
        checkpoint = find(root, iteration)
        self.path, self.model = checkpoint.path, checkpoint.model
        self.shapes, self.dtypes, self._chunks = {}, {}, {}
        index = read_index(self.path)
        damaged = f"checkpoint {self.path} cannot be loaded:"
        for key, tensor in index.state_dict_metadata.items():
            if key.startswith(("optimizer.", "rng_state")) or not hasattr(tensor, "chunks"):
                continue
            layers = range(tensor.size[0]) if key.startswith("decoder.layers.") else [None]
            for layer in layers:
                name = key if layer is None else key.replace("layers.", f"layers.{layer}.", 1)
                self.shapes[name] = tensor.size[layer is not None :]
                self.dtypes[name] = tensor.properties.dtype
        sizes = {}
        for place, info in index.storage_data.items():
            chunk = index.chunk_sizes.get((place.fqn, getattr(place, "offset", None)))
            if chunk is None:
                continue
            path = self.path / info.relative_path
            if path not in sizes:
                if path.parent != self.path or not path.is_file():
                    raise DamagedCheckpoint(f"{damaged} {path.name} is missing")
                sizes[path] = path.stat().st_size
            if sizes[path] < info.offset + info.length:
                raise DamagedCheckpoint(f"{damaged} {path.name} is cut off")
            self._chunks.setdefault(place.fqn, []).append(
                _Chunk(path, info.offset, info.length, place.offset, chunk)
            )

    def read(self, name: str, out: Tensor) -> Tensor:
        """Fills `out`, contiguous and of the tensor's shape and dtype."""
        key, layer = _key(name)
        box = out if layer is None else out[None]
        corner = (0,) * box.dim() if layer is None else (layer, *(0,) * out.dim())
        filled = 0
        for chunk in self._chunks.get(key, ()):
            low = [max(a, b) for a, b in zip(corner, chunk.start, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(corner, box.shape, chunk.start, chunk.shape, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            target = box[
                tuple(slice(a - c, b - c) for a, b, c in zip(low, high, corner, strict=True))
            ]
            stored = self._place(name, chunk)
            if tuple(target.shape) == chunk.shape and target.is_contiguous():
                stored.read(target)
            else:
                stored.read(whole := torch.empty(chunk.shape, dtype=stored.dtype))
                target.copy_(
                    whole[
                        tuple(
                            slice(a - s, b - s)
                            for a, b, s in zip(low, high, chunk.start, strict=True)
                        )
                    ]
                )
            filled += target.numel()
        if filled != out.numel():
            raise DamagedCheckpoint(f"checkpoint {self.path}: {name} is stored only in part")
        return out

    def _place(self, name: str, chunk: _Chunk) -> Stored:
        with open(chunk.path, "rb") as file:
            try:
                tensor = torch.load(
                    _Part(file, chunk.offset, chunk.length), map_location="meta", weights_only=True
                )
                stored = locate(chunk.path, name, tensor, chunk.offset)
            except Exception as error:  # of many classes, for damaged bytes
                raise DamagedCheckpoint(
                    f"checkpoint {self.path} cannot be loaded: {chunk.path.name} is damaged at "
                    f"{name} ({gist(error)})"
                ) from None
        if stored.shape != chunk.shape or stored.dtype != self.dtypes[name]:
            raise DamagedCheckpoint(
                f"checkpoint {self.path}: {name} in {chunk.path.name} is of shape "
                f"{stored.shape}, .metadata says {chunk.shape}"
            )
        return stored

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name, torch.empty(self.shapes[name], dtype=self.dtypes[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class _Part(io.RawIOBase):
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


class Writer(Written):
    """Writes whole tensors into one file of the `release` checkpoint of a folder, one by one.

    Several processes may write a file each; the `places` of all of them go to `finish`.

    Args:
        root: the checkpoint folder.
        rank: the file's number.

    Attributes:
        places: of what was put.
    """

    def __init__(self, root: Path, rank: int = 0):
        self.path, self.places = path_of(Path(root), "release") / f"__{rank}_0.distcp", []
        self._file = open(self.path, "xb")

    def put(self, name: str, tensor: Tensor) -> None:
        """`name` is that of an undivided model (`decoder.layers.3.mlp.linear_fc2.weight`)."""
        key, layer = _key(name)
        begin = self._file.tell()
        tensor = tensor.contiguous()
        axis = () if layer is None else (1,)
        # A storage of its own size, without a copy: torch.save would write all of a buffer's.
        alone = torch.frombuffer(data(tensor), dtype=tensor.dtype)
        try:
            torch.save(alone.view(*axis, *tensor.shape), self._file)
        except RuntimeError as error:  # torch's own, over what the disk said
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        corner = (*(layer for _ in axis), *(0 for _ in tensor.shape))
        self.places.append(
            Place(
                key,
                corner,
                (*axis, *tensor.shape),
                tensor.dtype,
                self.path.name,
                begin,
                self._file.tell() - begin,
            )
        )

    def close(self) -> None:
        self._file.flush()
        fsync(self.path)
        self._file.close()


def finish(root: Path, model: ModelConfig, places: list[Place]) -> None:
    """Makes of the files of Writers a checkpoint: metadata.json comes last."""
    path = path_of(root, "release")
    # Stock Megatron-LM does not load, by default, a checkpoint that lacks the extra state of its
    # layers or of Transformer Engine's. All of that is one None, in a file of its own.
    empty = path / f"__{1 + max(int(place.file.split('_')[2]) for place in places)}_0.distcp"
    torch.save([None], empty)  # as megatron-core wraps an object
    fsync(empty)
    count = {f"decoder.layers.{part}": model.num_layers for part in _EXTRA}
    count["decoder.final_layernorm"] = 1
    extra = [f"{name}._extra_state/shard_{i}_{n}" for name, n in count.items() for i in range(n)]
    write_index(path, places, model.num_layers, extra, empty)
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
        params_dtype=places[0].dtype,
    )
    torch.save(state | {"content_metadata": content_metadata()}, path / "common.pt")
    (path / "metadata.json").write_text(json.dumps(_BACKEND))
    publish(root, path, "release")


def write_weights(
    root: str | Path,
    tensors: Mapping[str, Tensor],
    model: ModelConfig,
    tokenizer_files: Iterable[Path] = (),
) -> Path:
    """Writes whole tensors as the `release` checkpoint of a folder, in one process.

    Args:
        tensors: by the names of an undivided model, as checkpoints.mapping makes them.
    """
    root = Path(root)
    path = begin(root, tokenizer_files)
    with Writer(root) as writer:
        for name, tensor in tensors.items():
            writer.put(name, tensor)
    finish(root, model, writer.places)
    return path


def begin(root: Path, tokenizer_files: Iterable[Path]) -> Path:
    """An empty `release` folder for Writers; what was there is no longer found."""
    path = path_of(root, "release")
    root.mkdir(parents=True, exist_ok=True)
    if path.exists():
        forget(root, "release")
        shutil.rmtree(path)
    path.mkdir()
    copy_tokenizer(root, tokenizer_files)
    return path


def read_weights(
    root: str | Path, iteration: int | None = None
) -> tuple[dict[str, Tensor], ModelConfig]:
    """All tensors at once, and the model."""
    weights = open_weights(root, iteration)
    return dict(weights), weights.model


def open_weights(root: str | Path, iteration: int | None = None) -> Weights | Legacy:
    """The weights of a checkpoint, in Megatron-LM's legacy layout too."""
    found = find(root, iteration)
    return Legacy(found.path) if found.is_legacy else Weights(root, iteration)


def _key(name: str) -> tuple[str, int | None]:
    match = _LAYER.match(name)
    if not match:
        return name, None
    return _LAYER.sub("decoder.layers.", name), int(match[1])
