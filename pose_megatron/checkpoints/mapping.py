"""Weights between Hugging Face and Megatron: one name table for each family of models.

The Megatron side is the whole model (TP1, PP1) in the Transformer-Engine spelling, in which
megatron-core stores every layer specification. Most tensors only change their name. Three do more:

    linear_qkv   [q_0 .. q_(n-1), k, v] of query group 0, then of group 1, ...  (n = heads / groups)
    linear_fc1   [gate; up]
    vocabulary   zero rows appended up to padded_vocab_size, and cut off on the way back

Values are never touched, so Hugging Face -> Megatron -> Hugging Face is bit-identical. A table row
needs no other, so a model is converted row by row in the memory of its largest one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pose_megatron.errors import ConfigError

# Megatron's name: Hugging Face's, or those of the parts that Megatron keeps in one tensor.
_LAYER, _HF = "decoder.layers.{}", "model.layers.{}"
_QKV = f"{_LAYER}.self_attention.linear_qkv"
_LLAMA = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    f"{_QKV}.layer_norm_weight": f"{_HF}.input_layernorm.weight",
    f"{_QKV}.weight": [f"{_HF}.self_attn.{x}_proj.weight" for x in "qkv"],
    f"{_LAYER}.self_attention.linear_proj.weight": f"{_HF}.self_attn.o_proj.weight",
    f"{_LAYER}.mlp.linear_fc1.layer_norm_weight": f"{_HF}.post_attention_layernorm.weight",
    f"{_LAYER}.mlp.linear_fc1.weight": [f"{_HF}.mlp.{x}_proj.weight" for x in ("gate", "up")],
    f"{_LAYER}.mlp.linear_fc2.weight": f"{_HF}.mlp.down_proj.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_GPTJ = "transformer.h.{}"
TABLES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA | {f"{_QKV}.bias": [f"{_HF}.self_attn.{x}_proj.bias" for x in "qkv"]},
    "qwen3": _LLAMA
    | {
        f"{_LAYER}.self_attention.{x}_layernorm.weight": f"{_HF}.self_attn.{x}_norm.weight"
        for x in "qk"
    },
    "baichuan": _LLAMA | {f"{_QKV}.weight": f"{_HF}.self_attn.W_pack.weight"},
    "gptj": {
        "embedding.word_embeddings.weight": "transformer.wte.weight",
        f"{_LAYER}.input_layernorm.weight": f"{_GPTJ}.ln_1.weight",
        f"{_LAYER}.input_layernorm.bias": f"{_GPTJ}.ln_1.bias",
        f"{_QKV}.weight": [f"{_GPTJ}.attn.{x}_proj.weight" for x in "qkv"],
        f"{_LAYER}.self_attention.linear_proj.weight": f"{_GPTJ}.attn.out_proj.weight",
        f"{_LAYER}.mlp.linear_fc1.weight": f"{_GPTJ}.mlp.fc_in.weight",
        f"{_LAYER}.mlp.linear_fc1.bias": f"{_GPTJ}.mlp.fc_in.bias",
        f"{_LAYER}.mlp.linear_fc2.weight": f"{_GPTJ}.mlp.fc_out.weight",
        f"{_LAYER}.mlp.linear_fc2.bias": f"{_GPTJ}.mlp.fc_out.bias",
        "decoder.final_layernorm.weight": "transformer.ln_f.weight",
        "decoder.final_layernorm.bias": "transformer.ln_f.bias",
        "output_layer.weight": "lm_head.weight",
        "output_layer.bias": "lm_head.bias",
    },
}
# What old checkpoints carry beside weights: rotary tables and causal masks.
_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attn.embed_positions")


@dataclass(frozen=True)
class ParamMapping:
    """One Megatron tensor and the Hugging Face tensors it is made of.

    Attributes:
        name, shape: Megatron's.
        parts: Hugging Face's names and shapes, whose concatenation holds the blocks.
        blocks: rows of the blocks (queries, keys, values; gate, up) that alternate.
        groups: how often they alternate.
    """

    name: str
    shape: tuple[int, ...]
    parts: dict[str, tuple[int, ...]]
    blocks: tuple[int, ...]
    groups: int = 1

    def pieces(self, tensor: Tensor) -> dict[str, list[Tensor]]:
        """Of Megatron's tensor, the views that make up each part, in the part's order."""
        step = len(self.blocks)
        rows = [length // self.groups for length in self.blocks] * self.groups
        views = tensor[: sum(self.blocks)].split(rows)
        in_order = iter([view for block in range(step) for view in views[block::step]])
        result = {}
        for name, shape in self.parts.items():
            result[name], missing = [], shape[0]
            while missing:
                result[name].append(next(in_order))
                missing -= len(result[name][-1])
        return result

    def join(self, read: Callable[[str, list[Tensor]], None], out: Tensor) -> Tensor:
        """Fills `out`, of this row's shape; read(name, pieces) fills the pieces of one part."""
        for name, pieces in self.pieces(out).items():
            read(name, pieces)
        out[sum(self.blocks) :].zero_()
        return out


def scatter(tensor: Tensor, pieces: Sequence[Tensor]) -> None:
    """Copies the rows of a tensor into pieces."""
    for piece, rows in zip(pieces, tensor.split([len(piece) for piece in pieces]), strict=True):
        piece.copy_(rows)


def param_mappings(
    *,
    family: str = "llama",  # of TABLES
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    kv_channels: int,  # channels of one head
    vocab_size: int,  # rows on the Hugging Face side
    padded_vocab_size: int,  # rows on Megatron's side
    tied: bool,  # the output layer is the embedding
) -> Iterator[ParamMapping]:
    """Every tensor of the model, in the order of the forward pass."""
    h, ffn = hidden_size, ffn_hidden_size
    q, kv = num_attention_heads * kv_channels, num_query_groups * kv_channels
    names = TABLES[family]
    gated = isinstance(names[f"{_LAYER}.mlp.linear_fc1.weight"], list)
    qkv, fc1 = (q, kv, kv), (ffn, ffn) if gated else (ffn,)
    vocabulary = ("word_embeddings.weight", "output_layer.weight", "output_layer.bias")
    blocks = {  # rows of each tensor that has others than h
        **dict.fromkeys(vocabulary, (vocab_size,)),
        "linear_qkv.weight": qkv,
        "linear_qkv.bias": qkv,
        "q_layernorm.weight": (kv_channels,),
        "k_layernorm.weight": (kv_channels,),
        "linear_fc1.weight": fc1,
        "linear_fc1.bias": fc1,
    }
    columns = {"linear_proj.weight": q, "linear_fc2.weight": ffn}

    def row(name: str, theirs: str | list[str], layer: int) -> ParamMapping:
        kind = ".".join(name.split(".")[-2:])
        rows = blocks.get(kind, (h,))
        vector = kind.endswith(("bias", "norm.weight", "norm_weight"))
        rest = () if vector else (columns.get(kind, h),)
        if isinstance(theirs, str):
            parts = {theirs.format(layer): (sum(rows), *rest)}
        else:
            parts = {n.format(layer): (r, *rest) for n, r in zip(theirs, rows, strict=True)}
        length = padded_vocab_size if kind in vocabulary else sum(rows)
        groups = num_query_groups if rows is qkv else 1
        return ParamMapping(name.format(layer), (length, *rest), parts, rows, groups)

    for i in range(num_layers):
        for name, theirs in names.items():
            in_layer = name.startswith(_LAYER)
            if in_layer or (i == 0 and name.startswith("embedding")):
                yield row(name, theirs, i)
    for name, theirs in names.items():
        if name.startswith("decoder.final") or (name.startswith("output") and not tied):
            yield row(name, theirs, 0)


def check_hf(
    shapes: Mapping[str, tuple[int, ...]], rows: Iterable[ParamMapping], tied: bool
) -> set[str]:
    """Holds the tensors of a Hugging Face model to their table.

    Args:
        shapes: by name. Buffers that old checkpoints carry are ignored.
        tied: whether a head that repeats the embedding is allowed.

    Returns:
        Such heads; their values must be the embedding's.

    Raises:
        ConfigError: a tensor is missing, unknown, or of another shape.
    """
    wanted = {name: shape for row in rows for name, shape in row.parts.items()}
    names = {name for name in shapes if not name.endswith(_BUFFERS)}
    spare_heads = names & {"lm_head.weight"} if tied else set()
    _check(shapes, names - spare_heads, wanted)
    return spare_heads


def check_megatron(shapes: Mapping[str, tuple[int, ...]], rows: Iterable[ParamMapping]) -> None:
    """The same for the names of an undivided Megatron model."""
    _check(shapes, set(shapes), {row.name: row.shape for row in rows})


def _check(shapes: Mapping, present: set[str], wanted: Mapping[str, tuple[int, ...]]) -> None:
    for what, names in (("missing", wanted.keys() - present), ("unknown", present - wanted.keys())):
        if names:
            first = ", ".join(sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(f"{what} tensor {first}{more}")
    for name, shape in wanted.items():
        if tuple(shapes[name]) != shape:
            raise ConfigError(f"tensor {name} has shape {tuple(shapes[name])}, expected {shape}")


def one_dtype(row: ParamMapping, dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """That of all parts of a row, or ValueError."""
    found = set(dtypes)
    if len(found) > 1:
        raise ConfigError(f"tensors {', '.join(row.parts)} must have one dtype")
    return found.pop()


def hf_to_megatron(tensors: Mapping[str, Tensor], **sizes) -> dict[str, Tensor]:
    """Megatron's tensors for those of a Hugging Face model; `sizes` as in `param_mappings`.

    Raises:
        ConfigError: as `check_hf`; or (tied) an `lm_head.weight` is there and differs from the
            embedding.
    """
    rows = list(param_mappings(**sizes))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for head in check_hf(shapes, rows, sizes["tied"]):
        (embedding,) = rows[0].parts
        if not torch.equal(tensors[head], tensors[embedding]):
            raise ConfigError(f"the embeddings are tied, but {head} differs from {embedding}")

    result = {}
    for row in rows:
        dtype = one_dtype(row, (tensors[name].dtype for name in row.parts))
        result[row.name] = row.join(
            lambda name, pieces: scatter(tensors[name], pieces), torch.empty(row.shape, dtype=dtype)
        )
    return result


def megatron_to_hf(tensors: Mapping[str, Tensor], **sizes) -> dict[str, Tensor]:
    """The inverse of `hf_to_megatron`, same sizes and errors; the results are contiguous."""
    rows = list(param_mappings(**sizes))
    check_megatron({name: tensor.shape for name, tensor in tensors.items()}, rows)
    return {
        name: torch.cat(pieces)
        for row in rows
        for name, pieces in row.pieces(tensors[row.name]).items()
    }
