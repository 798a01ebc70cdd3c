"""Weights between Hugging Face and Megatron, by the name table of the model's family.

The Megatron side is the whole model (TP1, PP1); models/tensors.py says how its tensors are made.
Most only change their name; linear_qkv, linear_fc1 and the padded vocabulary are also rearranged.

Values are never touched, so Hugging Face -> Megatron -> Hugging Face is bit-identical. A Megatron
tensor is converted by itself, and an expert of a mixture is tensors of its own, so a conversion
needs the memory of the largest one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pose_megatron.checkpoints.tensor_files import WEIGHT_DTYPES, not_convertible
from pose_megatron.errors import ConfigError
from pose_megatron.models.families import family_named
from pose_megatron.models.families.family import HFNames
from pose_megatron.models.tensors import EMBEDDING, EXPERT, LAYER, TensorShape

# Old checkpoints also carry rotary tables and causal masks.
_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attn.embed_positions")


@dataclass(frozen=True)
class ParamMapping:
    """One Megatron tensor and the Hugging Face tensors it is made of.

    Attributes:
        name, shape: the Megatron tensor's.
        parts: name and shape of each Hugging Face tensor; concatenated, they are the blocks, whole
            and one after another.
        blocks: rows of each block (queries, keys, values; gate, up), which Megatron interleaves.
        groups: in how many pieces each block is interleaved.
    """

    name: str
    shape: tuple[int, ...]
    parts: dict[str, tuple[int, ...]]
    blocks: tuple[int, ...]
    groups: int = 1

    def pieces(self, tensor: Tensor) -> dict[str, list[Tensor]]:
        """Views of the Megatron tensor: by Hugging Face name, those that concatenate to it."""
        step = len(self.blocks)
        rows = [length // self.groups for length in self.blocks] * self.groups
        views = tensor[: sum(self.blocks)].split(rows)
        in_order = iter([view for block in range(step) for view in views[block::step]])
        result: dict[str, list[Tensor]] = {}
        for name, shape in self.parts.items():
            result[name], missing = [], shape[0]
            while missing:
                result[name].append(next(in_order))
                missing -= len(result[name][-1])
        return result

    def join(self, read: Callable[[str, list[Tensor]], None], out: Tensor) -> Tensor:
        """Fills `out`, the Megatron tensor, and returns it.

        Args:
            read: read(name, pieces) copies the rows of a Hugging Face tensor into the pieces.
        """
        for name, pieces in self.pieces(out).items():
            read(name, pieces)
        out[sum(self.blocks) :].zero_()
        return out


def scatter(tensor: Tensor, pieces: Sequence[Tensor]) -> None:
    """Copies the rows of a tensor into the pieces, one after another."""
    for piece, rows in zip(pieces, tensor.split([len(piece) for piece in pieces]), strict=True):
        piece.copy_(rows)


def param_mappings(
    *,
    family: str = "llama",  # a name in models.families.FAMILIES
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    kv_channels: int,  # channels of one head
    vocab_size: int,  # rows on the Hugging Face side
    padded_vocab_size: int,  # rows on the Megatron side
    tied: bool,  # the output layer is the embedding
    num_experts: int | None = None,
    moe_ffn_hidden_size: int | None = None,
) -> Iterator[ParamMapping]:
    """Every tensor of the model, in the order of the forward pass."""
    tensors = family_named(family).tensors
    shapes = family_named(family).tensor_shapes(
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=num_attention_heads,
        num_query_groups=num_query_groups,
        kv_channels=kv_channels,
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab_size,
        num_experts=num_experts,
        moe_ffn_hidden_size=moe_ffn_hidden_size,
    )
    yield _param_mapping(EMBEDDING, tensors[EMBEDDING], shapes[EMBEDDING])
    for layer in range(num_layers):
        for name, hf_names in tensors.items():
            if name.startswith(EXPERT):
                for expert in range(num_experts or 0):
                    yield _param_mapping(name, hf_names, shapes[name], layer, expert)
            elif name.startswith(LAYER):
                yield _param_mapping(name, hf_names, shapes[name], layer)
    for name, hf_names in tensors.items():
        is_output = name.startswith("output_layer.")
        if name.startswith("decoder.final") or (is_output and not tied):
            yield _param_mapping(name, hf_names, shapes[name])


def _param_mapping(
    name: str, hf_names: HFNames, tensor: TensorShape, *numbers: int
) -> ParamMapping:
    if isinstance(hf_names, str):
        rows = {hf_names: sum(tensor.blocks)}
    else:
        rows = dict(zip(hf_names, tensor.blocks, strict=True))
    parts = {hf_name.format(*numbers): (n, *tensor.columns) for hf_name, n in rows.items()}
    return ParamMapping(name.format(*numbers), tensor.shape, parts, tensor.blocks, tensor.groups)


def check_hf(
    shapes: Mapping[str, tuple[int, ...]], mappings: Iterable[ParamMapping], tied: bool
) -> set[str]:
    """Checks the tensors of a Hugging Face model against its mappings.

    Args:
        shapes: by name. Buffers that old checkpoints carry are ignored.
        tied: whether an output layer that repeats the embedding is allowed.

    Returns:
        Names of such output layers; their values must be the embedding's.

    Raises:
        ConfigError: a tensor is missing, unknown, or of another shape.
    """
    wanted = {name: shape for mapping in mappings for name, shape in mapping.parts.items()}
    names = {name for name in shapes if not name.endswith(_BUFFERS)}
    spare_heads = names & {"lm_head.weight"} if tied else set()
    _check(shapes, names - spare_heads, wanted)
    return spare_heads


def check_megatron(shapes: Mapping[str, tuple[int, ...]], mappings: Iterable[ParamMapping]) -> None:
    """Checks the tensors of an undivided Megatron model; errors as in check_hf."""
    _check(shapes, set(shapes), {mapping.name: mapping.shape for mapping in mappings})


def _check(shapes: Mapping, present: set[str], wanted: Mapping[str, tuple[int, ...]]) -> None:
    for what, names in (("missing", wanted.keys() - present), ("unknown", present - wanted.keys())):
        if names:
            first = ", ".join(sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(f"{what} tensor {first}{more}")
    for name, shape in wanted.items():
        if tuple(shapes[name]) != shape:
            raise ConfigError(f"tensor {name} has shape {tuple(shapes[name])}, expected {shape}")


def one_dtype(mapping: ParamMapping, dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that all parts of a mapping have.

    Raises:
        ConfigError: they have several.
    """
    found = set(dtypes)
    if len(found) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise ConfigError(
            f"tensors {', '.join(mapping.parts)}, which Megatron keeps in one, are stored as "
            f"{names}; say with --dtype what to make of all weights"
        )
    return found.pop()


def check_weight_dtypes(dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuses stored tensors whose numbers are not the weights themselves.

    Raises:
        ConfigError: one is quantized, or no floating-point tensor; names it.
    """
    for name, dtype in dtypes.items():
        if dtype not in WEIGHT_DTYPES:
            raise not_convertible(f"tensor {name}", str(dtype).removeprefix("torch."))
