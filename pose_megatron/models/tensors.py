"""The tensors of an undivided Megatron model (TP1, PP1): names and shapes.

Names are Transformer Engine's, in which megatron-core stores every layer spec. `{}` in a name
stands for the layer's number, and a second one for the expert's.
"""

from collections.abc import Iterable
from dataclasses import dataclass

LAYER = "decoder.layers.{}"
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
# Of a mixture of experts: the norm before it, which no linear layer takes in, and its parts.
MOE_NORM = f"{LAYER}.pre_mlp_layernorm.weight"
ROUTER = f"{LAYER}.mlp.router.weight"
EXPERT = f"{LAYER}.mlp.experts.experts.{{}}"
_VOCABULARY = (EMBEDDING, OUTPUT, "output_layer.bias")


@dataclass(frozen=True)
class TensorShape:
    """The shape of one tensor, and the blocks of rows that it holds.

        linear_qkv   [q_0 .. q_(n-1), k, v] for query group 0, then for group 1, ...
                     (n = heads / groups)
        linear_fc1   [gate; up]
        vocabulary   one row per token, then zero rows up to padded_vocab_size

    Attributes:
        blocks: rows of each block over all groups, such as (q, k, v) or (gate, up).
        columns: (columns,) of a matrix, () of a vector.
        groups: how often the blocks alternate.
        padding: zero rows after the blocks.
    """

    blocks: tuple[int, ...]
    columns: tuple[int, ...] = ()
    groups: int = 1
    padding: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(self.blocks) + self.padding, *self.columns)


def tensor_shapes(
    names: Iterable[str],
    *,
    gated_mlp: bool,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    kv_channels: int,
    vocab_size: int,
    padded_vocab_size: int,
    num_experts: int | None = None,
    moe_ffn_hidden_size: int | None = None,
) -> dict[str, TensorShape]:
    """The shapes of tensors by name.

    A name that is not listed here has hidden_size rows: a vector if it is a norm or a bias, else a
    square matrix.

    Args:
        gated_mlp: linear_fc1 holds a gate beside the up projection.
        kv_channels: channels of one head.
        moe_ffn_hidden_size: of one expert.
    """
    q, kv = num_attention_heads * kv_channels, num_query_groups * kv_channels
    ffn = moe_ffn_hidden_size or ffn_hidden_size  # no family has experts and other MLPs
    fc1 = (ffn,) * (2 if gated_mlp else 1)
    blocks = {
        "linear_qkv.weight": (q, kv, kv),
        "linear_qkv.bias": (q, kv, kv),
        "q_layernorm.weight": (kv_channels,),
        "k_layernorm.weight": (kv_channels,),
        "linear_fc1.weight": fc1,
        "linear_fc1.bias": fc1,
        "router.weight": (num_experts or 0,),
    }
    columns = {"linear_proj.weight": q, "linear_fc2.weight": ffn}

    def shape(name: str) -> TensorShape:
        kind = ".".join(name.split(".")[-2:])
        is_vector = kind.endswith(("bias", "norm.weight", "norm_weight"))
        width = () if is_vector else (columns.get(kind, hidden_size),)
        if name in _VOCABULARY:
            return TensorShape((vocab_size,), width, padding=padded_vocab_size - vocab_size)
        groups = num_query_groups if kind.startswith("linear_qkv.") and kind in blocks else 1
        return TensorShape(blocks.get(kind, (hidden_size,)), width, groups)

    return {name: shape(name) for name in names}
