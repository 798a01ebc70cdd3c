"""LLaMA weights between Hugging Face and Megatron: a name table, state dict in, state dict out.

The Megatron side is the whole model (TP1, PP1) in the Transformer-Engine spelling, in which
megatron-core stores every layer specification. Most tensors only change their name. Three do more:

    linear_qkv   [q_0 .. q_(n-1), k, v] of query group 0, then of group 1, ...  (n = heads / groups)
    linear_fc1   [gate; up]
    vocabulary   zero rows appended up to padded_vocab_size, and cut off on the way back

Values are never touched, so Hugging Face -> Megatron -> Hugging Face is bit-identical. Both ways
take a Mapping and fetch each tensor once, in order, so the caller may read them lazily from disk.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One Megatron tensor and the Hugging Face tensors it is made of, with their shapes."""

    name: str
    shape: tuple[int, ...]
    parts: dict[str, tuple[int, ...]]
    groups: int = 1  # the parts alternate this many times along dimension 0


def hf_to_megatron(tensors: Mapping[str, Tensor], **sizes) -> dict[str, Tensor]:
    """Megatron's tensors for those of a Hugging Face `LlamaForCausalLM`; `sizes` as in `table`.

    `rotary_emb.inv_freq`, which old checkpoints carry, is ignored. Tensors that need no change are
    returned as they are, not copied.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape than `sizes` say; or (tied) an
            `lm_head.weight` is there and differs from the embedding.
    """
    rows = list(table(**sizes))
    names = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}
    spare_head = names & {"lm_head.weight"} if sizes["tied"] else set()
    _check_names(names - spare_head, {name for row in rows for name in row.parts})
    result = {}
    for row in rows:
        parts = [_fetch(tensors, name, shape) for name, shape in row.parts.items()]
        if len({part.dtype for part in parts}) > 1:
            raise ValueError(f"tensors {', '.join(row.parts)} must have one dtype")
        joined = parts[0]
        if len(parts) > 1:
            joined = torch.cat([p.unflatten(0, (row.groups, -1)) for p in parts], 1).flatten(0, 1)
        if padding := row.shape[0] - len(joined):
            joined = torch.cat((joined, joined.new_zeros(padding, *row.shape[1:])))
        result[row.name] = joined
    for name in spare_head:
        if not torch.equal(tensors[name], tensors["model.embed_tokens.weight"]):
            raise ValueError(
                f"the embeddings are tied, but {name} differs from model.embed_tokens.weight"
            )
    return result


def megatron_to_hf(tensors: Mapping[str, Tensor], **sizes) -> dict[str, Tensor]:
    """The inverse of `hf_to_megatron`, same sizes and errors; the results are contiguous."""
    rows = list(table(**sizes))
    _check_names(set(tensors), {row.name for row in rows})
    result = {}
    for row in rows:
        tensor = _fetch(tensors, row.name, row.shape)
        lengths = [shape[0] for shape in row.parts.values()]
        by_group = tensor[: sum(lengths)].unflatten(0, (row.groups, -1))
        parts = by_group.split([length // row.groups for length in lengths], dim=1)
        for name, part in zip(row.parts, parts, strict=True):
            result[name] = part.flatten(0, 1).contiguous()
    return result


def table(
    *,
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    kv_channels: int,  # channels of one head
    vocab_size: int,  # rows on the Hugging Face side
    padded_vocab_size: int,  # rows on Megatron's side
    tied: bool,  # the output layer is the embedding
) -> Iterator[Row]:
    """Every tensor of the model, in the order of the forward pass."""
    h, ffn = hidden_size, ffn_hidden_size
    q, kv = num_attention_heads * kv_channels, num_query_groups * kv_channels
    vocabulary, padded = (vocab_size, h), (padded_vocab_size, h)
    yield Row("embedding.word_embeddings.weight", padded, {"model.embed_tokens.weight": vocabulary})
    for i in range(num_layers):
        attention, mlp = f"decoder.layers.{i}.self_attention", f"decoder.layers.{i}.mlp"
        hf = f"model.layers.{i}"
        qkv = {
            f"{hf}.self_attn.q_proj.weight": (q, h),
            f"{hf}.self_attn.k_proj.weight": (kv, h),
            f"{hf}.self_attn.v_proj.weight": (kv, h),
        }
        gate_up = {f"{hf}.mlp.{part}_proj.weight": (ffn, h) for part in ("gate", "up")}
        norm = f"{attention}.linear_qkv.layer_norm_weight"
        yield Row(norm, (h,), {f"{hf}.input_layernorm.weight": (h,)})
        yield Row(f"{attention}.linear_qkv.weight", (q + 2 * kv, h), qkv, num_query_groups)
        output = {f"{hf}.self_attn.o_proj.weight": (h, q)}
        yield Row(f"{attention}.linear_proj.weight", (h, q), output)
        norm = f"{mlp}.linear_fc1.layer_norm_weight"
        yield Row(norm, (h,), {f"{hf}.post_attention_layernorm.weight": (h,)})
        yield Row(f"{mlp}.linear_fc1.weight", (2 * ffn, h), gate_up)
        down = {f"{hf}.mlp.down_proj.weight": (h, ffn)}
        yield Row(f"{mlp}.linear_fc2.weight", (h, ffn), down)
    yield Row("decoder.final_layernorm.weight", (h,), {"model.norm.weight": (h,)})
    if not tied:
        yield Row("output_layer.weight", padded, {"lm_head.weight": vocabulary})


def _check_names(present: set[str], wanted: set[str]) -> None:
    for what, names in (("missing", wanted - present), ("unknown", present - wanted)):
        if names:
            first = ", ".join(sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{what} tensor {first}{more}")


def _fetch(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = tensors[name]
    if tensor.shape != shape:
        raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
    return tensor
