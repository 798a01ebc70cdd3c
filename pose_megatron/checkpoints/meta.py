"""LLaMA 1, 2 and 3 in Meta's own format, under the names that Hugging Face has for their tensors.

    params.json           sizes, rope
    consolidated.NN.pth   what tensor-parallel rank NN of Meta's code loads, in torch's format
    checklist.chk         md5 of the files, where it was downloaded along

Each rank has a slice of every matrix: of the rows, or of the columns. Meta rotates neighbouring
channels of a head and Hugging Face its two halves, so the rows of queries and keys are permuted.
Reading and writing go tensor by tensor.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pose_megatron.checkpoints.mapping import scatter
from pose_megatron.checkpoints.tensor_files import Stored, Written, read_torch, write_at
from pose_megatron.errors import ConfigError
from pose_megatron.models.families import family_named
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.huggingface import from_hf, to_hf
from pose_megatron.runtime.atomic_files import fsync, gist

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
# Windows that params.json leaves unsaid, by (rope_theta, norm_eps).
_WINDOWS = {(1e4, 1e-6): 2048, (1e4, 1e-5): 4096, (1e6, 1e-5): 16384, (5e5, 1e-5): 8192}
_SCALED = {  # what `use_scaled_rope` means in Meta's code
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class _Slices:
    """Where the slices of one tensor are, by rank, and along which dimension they join."""

    parts: tuple[Stored, ...]
    dim: int | None
    heads: int | None = None  # of queries or keys, whose rows are permuted


class Tensors(Mapping):
    """The weights of a folder under Hugging Face's names, merged; each is read when asked for.

    Attributes:
        shapes, dtypes: by name, known without reading.
        hashes: md5 of the files, from checklist.chk.
        params: params.json.
        warnings: none, so far.

    Raises:
        ConfigError: params.json or a file is missing or damaged, or the slices do not fit.
    """

    def __init__(self, folder: Path):
        self.folder, self.params, self.warnings = folder, _read_params(folder), []
        paths = sorted(folder.glob("consolidated.*.pth"))
        wanted = [folder / file_name(rank) for rank in range(max(len(paths), 1))]
        if missing := [path.name for path in wanted if path not in paths]:
            raise ConfigError(f"{folder}: shard {missing[0]} is missing")
        ranks = [read_torch(path) for path in paths]
        self._slices, self.shapes, self.dtypes = {}, {}, {}
        layers = range(self.params["n_layers"])
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
        shape, width = list(parts[0].shape), self.params["dim"]
        if "embed" in name and shape[1] == width:
            dim = 0
        if dim is None:
            parts = parts[:1]
        else:
            shape[dim] *= len(parts)
        heads = None
        if name.endswith(_ROTATED):
            heads = shape[0] // (width // self.params["n_heads"])
        self._slices[name] = _Slices(parts, dim, heads)
        self.shapes[name], self.dtypes[name] = tuple(shape), parts[0].dtype

    def read(self, name: str, pieces: Sequence[Tensor]) -> None:
        """Fills pieces, each contiguous, with the tensor's rows one after the other."""
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

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        self._read(self._slices[name], tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)


def read_config(
    tensors: Tensors, window: int | None = None, make_vocab_size_divisible_by: int = 128
) -> ModelConfig:
    """The model of a folder.

    Args:
        window: max_position_embeddings, which params.json does not say; None: that of the
            published model with this rope.

    Raises:
        ConfigError: params.json says too little, or what LLaMA has not.
    """
    params, where = tensors.params, tensors.folder / "params.json"
    base, epsilon = float(params.get("rope_theta", 1e4)), float(params["norm_eps"])
    scaled = params.get("use_scaled_rope", False)
    if window is None:
        window = 131072 if scaled else _WINDOWS.get((base, epsilon))
    if window is None:
        raise ConfigError(
            f"{where} does not say the window of the model: give --max-position-embeddings"
        )
    rope = {"rope_theta": base}
    if scaled:
        factor = float(params.get("rope_scaling_factor", _SCALED["factor"]))
        high = float(params.get("rope_high_freq_factor", _SCALED["high_freq_factor"]))
        rope["rope_scaling"] = _SCALED | {"factor": factor, "high_freq_factor": high}
    base, scaling = from_hf(rope)
    heads, width = params["n_heads"], params["dim"]
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    tied = tensors.shapes[embedding] == tensors.shapes[head] and torch.equal(
        tensors[embedding], tensors[head]
    )
    return ModelConfig(
        num_layers=params["n_layers"],
        hidden_size=width,
        ffn_hidden_size=tensors.shapes["model.layers.0.mlp.up_proj.weight"][0],
        num_attention_heads=heads,
        num_query_groups=params.get("n_kv_heads") or heads,
        kv_channels=width // heads,
        vocab_size=tensors.shapes[embedding][0],
        max_position_embeddings=window,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        untie_embeddings_and_output_weights=not tied,
        norm_epsilon=epsilon,
        rotary_base=base,
        rope_scaling=scaling,
    )


def write_params(folder: Path, model: ModelConfig, ranks: int) -> None:
    """Writes params.json.

    Raises:
        ConfigError: Meta's code has no such model, rope or number of ranks.
    """
    plain = family_named(model.family).in_meta_format and model.rotary_percent == 1.0
    if not plain or model.kv_channels * model.num_attention_heads != model.hidden_size:
        raise ConfigError(
            f"Meta's format has LLaMA only, not {model.family} with heads of "
            f"{model.kv_channels} of {model.hidden_size} channels"
        )
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
        if getattr(model, name) % ranks:
            raise ConfigError(
                f"--target-tensor-parallel-size {ranks} does not divide {name} "
                f"{getattr(model, name)}"
            )
    rope = to_hf(
        model.rope_scaling,
        base=model.rotary_base,
        rotary_dim=model.rotary_dim,
        max_position_embeddings=model.max_position_embeddings,
    )
    scaled = rope["rope_scaling"] or {}
    factor, high = scaled.get("factor"), scaled.get("high_freq_factor")
    if scaled and {k: scaled.get(k) for k in _SCALED} != _SCALED | {
        "factor": factor,
        "high_freq_factor": high,
    }:
        raise ConfigError(
            f"--rope-scaling {model.rope_scaling.method} cannot be said in Meta's "
            "format; save as hf"
        )
    multiple, multiplier = _ffn_words(model.hidden_size, model.ffn_hidden_size)
    params = {
        "dim": model.hidden_size,
        "n_layers": model.num_layers,
        "n_heads": model.num_attention_heads,
        "n_kv_heads": model.num_query_groups,
        "vocab_size": model.vocab_size,
        "multiple_of": multiple,
        **({"ffn_dim_multiplier": multiplier} if multiplier else {}),
        "norm_eps": model.norm_epsilon,
        "rope_theta": rope["rope_theta"],
    }
    if scaled:
        params |= {
            "use_scaled_rope": True,
            "rope_scaling_factor": factor,
            "rope_high_freq_factor": high,
        }
    (folder / "params.json").write_text(json.dumps(params) + "\n")


class Writer(Written):
    """One consolidated.NN.pth; the tensors are put one by one, whole and by Hugging Face's names.

    Args:
        shapes, dtypes: of all tensors, whole, by Hugging Face's names.
        rank, ranks: which slices this file has.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        shapes: Mapping,
        dtypes: Mapping,
        rank: int,
        ranks: int,
    ):
        self.path, self._rank, self._ranks = folder / file_name(rank), rank, ranks
        self._heads = dict(
            zip(_ROTATED, (model.num_attention_heads, model.num_query_groups), strict=True)
        )
        # LLaMA 3's code slices the rows of the embedding, that of 1 and 2 its columns.
        self._embedding_dim = 0 if model.rotary_base >= 5e5 else 1
        empty = {}
        for name, shape in shapes.items():
            meta, dim = self._meta(name)
            shape = list(shape)
            if dim is not None:
                shape[dim] //= ranks
            empty[meta] = torch.empty(shape, dtype=dtypes[name])
        try:
            with torch.serialization.skip_data():  # the file with holes where the values come
                torch.save(empty, self.path)
        except RuntimeError as error:  # all that torch says of a full disk
            raise OSError(f"{self.path} cannot be written: {gist(error)}") from None
        self._places = read_torch(self.path)
        self._file = open(self.path, "r+b", buffering=0)

    def put(self, name: str, tensor: Tensor) -> None:
        meta, dim = self._meta(name)
        if dim is not None:
            tensor = tensor.chunk(self._ranks, dim=dim)[self._rank]
        for kind, heads in self._heads.items():
            if name.endswith(kind):
                tensor = _to_neighbours(tensor, heads // self._ranks)
        stored = self._places.pop(meta)
        assert (stored.shape, stored.dtype) == (tuple(tensor.shape), tensor.dtype), name
        write_at(self._file.fileno(), stored.offset, tensor.contiguous())

    def _meta(self, name: str) -> tuple[str, int | None]:
        """Meta's name, and the dimension that is sliced."""
        layer = next((part for part in name.split(".") if part.isdecimal()), "")
        meta, dim = _NAMES[name.replace(f".{layer}.", ".{}.") if layer else name]
        return meta.format(layer), self._embedding_dim if "embed" in name else dim

    def close(self) -> None:
        assert not self._places, f"never put: {', '.join(self._places)}"
        self._file.close()
        fsync(self.path)


def file_name(rank: int) -> str:
    return f"consolidated.{rank:02d}.pth"


def _to_halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from (0, 1), (2, 3), ... to (0, d/2), (1, d/2 + 1), ..."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _to_neighbours(tensor: Tensor, heads: int) -> Tensor:
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def ffn_hidden_size(width: int, multiple: int, multiplier: float | None) -> int:
    """Of Meta's code."""
    hidden = int(2 * 4 * width / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple * math.ceil(hidden / multiple)


def _ffn_words(width: int, ffn: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier of which Meta's code makes `ffn`."""
    for multiple in (256, 1024, 4096):
        if ffn_hidden_size(width, multiple, None) == ffn:
            return multiple, None
    multiple = math.gcd(ffn, 4096)
    multiplier = ffn / int(2 * 4 * width / 3)
    while ffn_hidden_size(width, multiple, multiplier) < ffn:
        multiplier = math.nextafter(multiplier, math.inf)
    while ffn_hidden_size(width, multiple, multiplier) > ffn:
        multiplier = math.nextafter(multiplier, 0)
    return multiple, multiplier


def _read_params(folder: Path) -> dict:
    path = folder / "params.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing")
    try:
        params = json.loads(path.read_text())
        whole = all(isinstance(params[name], int) for name in ("dim", "n_layers", "n_heads"))
        params["norm_eps"] + 0.0
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not the params.json of a LLaMA: {gist(error)}") from None
    if not whole:
        raise ConfigError(f"{path}: dim, n_layers and n_heads must be whole numbers")
    return params


def _checklist(folder: Path) -> dict[Path, tuple[str, str]]:
    path = folder / "checklist.chk"
    lines = path.read_text().splitlines() if path.is_file() else []
    pairs = [line.split() for line in lines]
    return {
        folder / pair[1]: ("md5", pair[0])
        for pair in pairs
        if len(pair) == 2 and (folder / pair[1]).is_file()
    }
