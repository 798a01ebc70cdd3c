"""The weights of a LLaMA in Meta's own format, under Hugging Face's names.

    consolidated.NN.pth   what tensor-parallel rank NN of Meta's code loads, in torch's format
    checklist.chk         md5 sums of the files, where it was downloaded along

Each rank holds a slice of every matrix: some of its rows, or some of its columns. Meta rotates
neighbouring channels of a head and Hugging Face the two halves of a head, so the rows of queries
and keys are permuted. Reading and writing go tensor by tensor.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pose_megatron.checkpoints import checksums
from pose_megatron.checkpoints.mapping import scatter
from pose_megatron.checkpoints.meta.params import read_params
from pose_megatron.checkpoints.stored_weights import StoredWeights
from pose_megatron.checkpoints.tensor_files import OutputFile, Stored, data, read_torch, write_at
from pose_megatron.errors import ConfigError, DamagedCheckpoint, gist
from pose_megatron.models.shape import ModelConfig
from pose_megatron.runtime.atomic_files import fsync

_NAMES = {  # Hugging Face's: Meta's, and the dimension that is sliced
    "model.embed_tokens.weight": ("tok_embeddings.weight", 1),  # of LLaMA 3: 0
    "model.layers.{}.input_layernorm.weight": ("layers.{}.attention_norm.weight", None),
    "model.layers.{}.self_attn.q_proj.weight": ("layers.{}.attention.wq.weight", 0),
    "model.layers.{}.self_attn.k_proj.weight": ("layers.{}.attention.wk.weight", 0),
    "model.layers.{}.self_attn.v_proj.weight": ("layers.{}.attention.wv.weight", 0),
    "model.layers.{}.self_attn.o_proj.weight": ("layers.{}.attention.wo.weight", 1),
    "model.layers.{}.post_attention_layernorm.weight": ("layers.{}.ffn_norm.weight", None),
    "model.layers.{}.mlp.gate_proj.weight": ("layers.{}.feed_forward.w1.weight", 0),
    "model.layers.{}.mlp.up_proj.weight": ("layers.{}.feed_forward.w3.weight", 0),
    "model.layers.{}.mlp.down_proj.weight": ("layers.{}.feed_forward.w2.weight", 1),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
}
_ROTATED = ("q_proj.weight", "k_proj.weight")


@dataclass(frozen=True)
class _Slices:
    """Where the slices of one tensor are, by rank, and along which dimension they join."""

    parts: tuple[Stored, ...]
    dim: int | None
    heads: int | None = None  # of queries or keys, whose rows are permuted


class MetaWeights(StoredWeights):
    """The weights of a folder, the ranks' slices joined.

    Raises:
        ConfigError: a tensor is missing or unknown, or the slices do not fit together.
        DamagedCheckpoint: params.json or a file is missing or damaged.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self._params = folder, read_params(folder)
        paths = sorted(folder.glob("consolidated.*.pth"))
        expected = [folder / file_name(rank) for rank in range(max(len(paths), 1))]
        if missing := [path.name for path in expected if path not in paths]:
            raise DamagedCheckpoint(f"{folder}: shard {missing[0]} is missing")
        ranks = [read_torch(path) for path in paths]
        self._slices: dict[str, _Slices] = {}
        layers = range(self._params["n_layers"])
        unknown = {name for rank in ranks for name in rank} - {"rope.freqs"}
        for name, (theirs, dim) in _NAMES.items():
            for layer in layers if "{}" in name else [0]:
                meta = theirs.format(layer)
                unknown.discard(meta)
                if any(meta not in rank for rank in ranks):
                    raise ConfigError(f"{folder}: missing tensor {meta}")
                self._add(name.format(layer), tuple(rank[meta] for rank in ranks), dim)
        if unknown:
            raise ConfigError(f"{folder}: unknown tensor {min(unknown)}")
        self.hashes = _checklist(folder)

    def _add(self, name: str, parts: tuple[Stored, ...], dim: int | None) -> None:
        if len({(part.shape, part.dtype) for part in parts}) > 1:
            raise ConfigError(f"{self.folder}: slices of {name} differ in shape or dtype")
        shape, width = list(parts[0].shape), self._params["dim"]
        if "embed" in name and shape[1] == width:
            dim = 0
        if dim is None:
            parts = parts[:1]
        else:
            shape[dim] *= len(parts)
        heads = None
        if name.endswith(_ROTATED):
            heads = shape[0] // (width // self._params["n_heads"])
        self._slices[name] = _Slices(parts, dim, heads)
        self.shapes[name], self.dtypes[name] = tuple(shape), parts[0].dtype

    def read(self, name: str, pieces: Sequence[Tensor]) -> None:
        if len(pieces) > 1:
            scatter(self[name], pieces)
        else:
            self._read(self._slices[name], pieces[0])

    def _read(self, slices: _Slices, out: Tensor) -> None:
        targets = out.chunk(len(slices.parts), dim=slices.dim or 0)
        in_place = slices.dim in (None, 0) and not slices.heads
        for part, target in zip(slices.parts, targets, strict=True):
            if in_place:
                part.read(target)
                continue
            part.read(tensor := torch.empty(part.shape, dtype=part.dtype))
            if slices.heads:
                tensor = _to_halves(tensor, slices.heads // len(slices.parts))
            target.copy_(tensor)


class ConsolidatedWriter(OutputFile):
    """One consolidated.NN.pth; tensors are put one by one, whole, by Hugging Face's names.

    Args:
        shapes, dtypes: all tensors, undivided, by Hugging Face's names.
        rank, ranks: whose slices this file holds, and among how many.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        rank: int,
        ranks: int,
    ):
        self.path, self._rank, self._ranks = folder / file_name(rank), rank, ranks
        self._heads = dict(
            zip(_ROTATED, (model.num_attention_heads, model.num_query_groups), strict=True)
        )
        # The code of LLaMA 3 slices the embedding's rows, the code of LLaMA 1 and 2 its columns.
        self._embedding_dim = 0 if model.rotary_base >= 5e5 else 1
        empty = {}
        for name, shape in shapes.items():
            meta, dim = self._meta(name)
            slice_shape = list(shape)
            if dim is not None:
                slice_shape[dim] //= ranks
            empty[meta] = torch.empty(slice_shape, dtype=dtypes[name])
        try:
            with torch.serialization.skip_data():  # the file with holes where the values come
                torch.save(empty, self.path)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"{self.path} cannot be written: {gist(error)}") from None
        self._missing = read_torch(self.path)
        self._crcs: dict[int, int] = {}
        self._file = open(self.path, "r+b", buffering=0)

    def put(self, name: str, tensor: Tensor) -> None:
        meta, dim = self._meta(name)
        if dim is not None:
            tensor = tensor.chunk(self._ranks, dim=dim)[self._rank]
        for kind, heads in self._heads.items():
            if name.endswith(kind):
                tensor = _to_neighbours(tensor, heads // self._ranks)
        stored = self._missing.pop(meta)
        assert (stored.shape, stored.dtype) == (tuple(tensor.shape), tensor.dtype), name
        tensor = tensor.contiguous()
        self._crcs[stored.offset] = zlib.crc32(data(tensor))
        write_at(self._file.fileno(), stored.offset, tensor)

    def _meta(self, name: str) -> tuple[str, int | None]:
        """Meta's name, and the dimension that is sliced."""
        layer = next((part for part in name.split(".") if part.isdecimal()), "")
        meta, dim = _NAMES[name.replace(f".{layer}.", ".{}.") if layer else name]
        return meta.format(layer), self._embedding_dim if "embed" in name else dim

    def close(self) -> None:
        assert not self._missing, f"never put: {', '.join(self._missing)}"
        self._file.close()
        checksums.write(self.path, self._crcs)
        fsync(self.path)


def file_name(rank: int) -> str:
    return f"consolidated.{rank:02d}.pth"


def _to_halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from (0, 1), (2, 3), ... to (0, d/2), (1, d/2 + 1), ..."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _to_neighbours(tensor: Tensor, heads: int) -> Tensor:
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _checklist(folder: Path) -> dict[Path, tuple[str, str]]:
    path = folder / "checklist.chk"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pairs = [line.split() for line in lines]
    return {
        folder / pair[1]: ("md5", pair[0])
        for pair in pairs
        if len(pair) == 2 and (folder / pair[1]).is_file()
    }
