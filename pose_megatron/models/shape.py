"""The shape of a model: what a checkpoint stores of it."""

import dataclasses
import math
from dataclasses import dataclass

from pose_megatron.errors import ConfigError, spell
from pose_megatron.rope.scaling import RopeScaling, inverse_frequencies


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model of LLaMA's kin, or of a GPT-J; rotary positions in all of them.

    `family` is a name of models.families, None where Hugging Face has no family like it.
    `add_qkv_bias` (Qwen2) and `qk_layernorm` (Qwen3) add to LLaMA's layer; `gptj` has a layer and
    `baichuan` an output layer of its own.

    `rotary_base` and `rope_scaling` say how positions turn into angles; the model accepts position
    ids in [0, max_position_embeddings). `vocab_size` is the tokenizer's; the embedding has
    `padded_vocab_size` rows, padded by a divisor that does not depend on the layout of ranks.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    make_vocab_size_divisible_by: int = 128
    untie_embeddings_and_output_weights: bool = False
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling: RopeScaling = RopeScaling()
    family: str | None = "llama"
    add_qkv_bias: bool = False
    qk_layernorm: bool = False

    def __post_init__(self):
        heads, groups = self.num_attention_heads, self.num_query_groups
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "vocab_size",
            "max_position_embeddings",
            "make_vocab_size_divisible_by",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{spell(name)} must be at least 1, not {getattr(self, name)}")
        if heads % groups:
            raise ConfigError(
                f"--num-attention-heads {heads} is not a multiple of --num-query-groups {groups}"
            )
        if not 0 < self.rotary_percent <= 1:
            raise ConfigError(f"--rotary-percent must be in (0, 1], not {self.rotary_percent}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ConfigError(
                f"--kv-channels {self.kv_channels} x --rotary-percent {self.rotary_percent} gives "
                f"{self.rotary_dim} rotary dimensions; they must be even"
            )
        # What the scaling cannot do with this many dimensions, it says itself.
        inverse_frequencies(self.rotary_dim, self.rotary_base, self.rope_scaling, length=1)

    @property
    def rotary_dim(self) -> int:
        return int(self.kv_channels * self.rotary_percent)

    @property
    def is_gptj(self) -> bool:
        return self.family == "gptj"

    @property
    def padded_vocab_size(self) -> int:
        divisor = self.make_vocab_size_divisible_by
        return math.ceil(self.vocab_size / divisor) * divisor

    @property
    def num_parameters(self) -> int:
        """Number of trainable values, vocabulary padding included."""
        h, d, ffn = self.hidden_size, self.kv_channels, self.ffn_hidden_size
        qkv = d * (self.num_attention_heads + 2 * self.num_query_groups)
        layer = h * qkv + h * d * self.num_attention_heads
        layer += qkv * self.add_qkv_bias + 2 * d * self.qk_layernorm
        tables = (2 if self.untie_embeddings_and_output_weights else 1) * self.padded_vocab_size * h
        if self.is_gptj:  # MLP with biases, one norm of weight and bias, bias of the output layer
            layer += 2 * h * ffn + ffn + h + 2 * h
            return self.num_layers * layer + tables + self.padded_vocab_size + 2 * h
        return self.num_layers * (layer + 3 * h * ffn + 2 * h) + tables + h

    def flops_per_token(self, window: int) -> float:
        """Model FLOPs of training on one token of a window: forward, and twice that backward.

        Two for each weight of a matrix that multiplies the token, and two for each of the
        window / 2 keys (on average, under the causal mask) in q.k and again in the sum of values.
        """
        h, d = self.hidden_size, self.kv_channels
        projections = h * d * (2 * self.num_attention_heads + 2 * self.num_query_groups)
        attention = self.num_attention_heads * d * window
        mlp = (2 if self.is_gptj else 3) * h * self.ffn_hidden_size
        layer = 2 * (projections + mlp) + 2 * attention
        return 3.0 * (self.num_layers * layer + 2 * h * self.padded_vocab_size)

    def to_dict(self) -> dict:
        """Plain values only, for a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        known = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in values.items() if k in known}
        return cls(**values | {"rope_scaling": RopeScaling(**values.get("rope_scaling", {}))})


def family_of(add_qkv_bias: bool, qk_layernorm: bool) -> str | None:
    """The Hugging Face family that has these beside LLaMA's layer."""
    families = {(False, False): "llama", (True, False): "qwen2", (False, True): "qwen3"}
    return families.get((add_qkv_bias, qk_layernorm))
