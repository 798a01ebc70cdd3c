"""The shape of a model, as checkpoints store it."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from pose_megatron.errors import ConfigError, flag_name
from pose_megatron.models.families import family_named
from pose_megatron.models.tensors import EXPERT, LAYER, OUTPUT
from pose_megatron.rope.scaling import RopeScaling, inverse_frequencies

_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "vocab_size", "max_position_embeddings", "make_vocab_size_divisible_by"),
)
_NUMBERS = ("norm_epsilon", "rotary_base", "rotary_percent")
# What a config may ask for before its weights are looked at: tensors are listed layer by layer,
# expert by expert. The largest published models have some 130 layers and 25,000 experts in all.
LARGEST_SIZE = 2**31 - 1
LARGEST_NUMBER = 1e300  # below what a float holds, as whole numbers in JSON need not be
MOST_LAYERS = 10_000
MOST_EXPERTS = 200_000
MOST_CHANNELS = 1 << 16  # of a head: its frequencies are computed at once
_OF_EXPERTS = ("num_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model with rotary positions.

    `family` is a name in models.families.FAMILIES and says what the layers and the output layer
    are; None stands for Qwen2's biases and Qwen3's norms together, which Hugging Face does not
    have. `add_qkv_bias` and `qk_layernorm` are the family's, by the names of Megatron's flags.

    With `num_experts`, every layer's MLP is a mixture of experts of width `moe_ffn_hidden_size`: a
    token goes to the `moe_router_topk` with the largest router logits and takes their sum weighted
    by the softmax over these, or, with `moe_router_pre_softmax`, over all experts.

    `rotary_base` and `rope_scaling` say how positions turn into angles; the model accepts position
    ids in [0, max_position_embeddings). `vocab_size` is the tokenizer's; the embedding has
    `padded_vocab_size` rows, a multiple of `make_vocab_size_divisible_by`, which does not depend on
    the layout of ranks.

    Raises:
        ConfigError: a size is out of range, or two of them do not fit together; names the flag.
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
    num_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_router_topk: int | None = None
    moe_router_pre_softmax: bool = False

    def __post_init__(self):
        heads, groups = self.num_attention_heads, self.num_query_groups
        for name in _SIZES:
            check_size(flag_name(name), getattr(self, name))
        for name in _NUMBERS:
            check_number(flag_name(name), getattr(self, name), least=0)
        for name, most in (("num_layers", MOST_LAYERS), ("kv_channels", MOST_CHANNELS)):
            if (value := getattr(self, name)) > most:
                raise ConfigError(f"{flag_name(name)} {value} is more than {most:,}")
        if heads % groups:
            raise ConfigError(
                f"--num-attention-heads {heads} is not a multiple of --num-query-groups {groups}"
            )
        self._check_experts()
        if not 0 < self.rotary_percent <= 1:
            raise ConfigError(f"--rotary-percent must be in (0, 1], not {self.rotary_percent}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ConfigError(
                f"--kv-channels {self.kv_channels} x --rotary-percent {self.rotary_percent} gives "
                f"{self.rotary_dim} rotary dimensions; they must be even"
            )
        # Raises where the scaling does not suit this many dimensions.
        inverse_frequencies(self.rotary_dim, self.rotary_base, self.rope_scaling, length=1)

    def _check_experts(self) -> None:
        experts, topk, family = self.num_experts, self.moe_router_topk, family_named(self.family)
        if experts is None:
            for name in _OF_EXPERTS:
                if value := getattr(self, name):
                    raise ConfigError(f"{flag_name(name)} {value} needs --num-experts")
            if family.has_experts:
                raise ConfigError(f"--num-experts is missing: {family.title} is a mixture of them")
            return
        for name in ("num_experts", "moe_ffn_hidden_size", "moe_router_topk"):
            check_size(flag_name(name), getattr(self, name))
        assert topk is not None
        if experts * self.num_layers > MOST_EXPERTS:
            raise ConfigError(
                f"--num-experts {experts} in each of --num-layers {self.num_layers} are more than "
                f"{MOST_EXPERTS:,}"
            )
        if not family.has_experts:
            raise ConfigError(f"--num-experts {experts}: {family.title} has no experts")
        if topk > experts:
            raise ConfigError(f"--moe-router-topk {topk} is more than --num-experts {experts}")
        if topk == 1 and not self.moe_router_pre_softmax:
            raise ConfigError(
                "--moe-router-topk 1 needs --moe-router-pre-softmax: the softmax over one expert "
                "is 1, whatever the router says"
            )
        if self.moe_router_pre_softmax and family.normalizes_key is None:
            raise ConfigError(
                f"--moe-router-pre-softmax: the softmax of {family.title} is over the chosen "
                "experts; Qwen3-MoE has both forms"
            )

    @property
    def rotary_dim(self) -> int:
        return int(self.kv_channels * self.rotary_percent)

    @property
    def padded_vocab_size(self) -> int:
        divisor = self.make_vocab_size_divisible_by
        return math.ceil(self.vocab_size / divisor) * divisor

    @property
    def num_parameters(self) -> int:
        """Number of trainable values, vocabulary padding included."""
        return self._count(self._tensor_shapes())

    @property
    def num_expert_parameters(self) -> int:
        """Those of num_parameters that are of experts."""
        shapes = self._tensor_shapes().items()
        return self._count({name: shape for name, shape in shapes if name.startswith(EXPERT)})

    def _count(self, shapes: dict[str, tuple[int, ...]]) -> int:
        return sum(
            math.prod(shape)
            * (self.num_layers if name.startswith(LAYER) else 1)
            * (self.num_experts or 0 if name.startswith(EXPERT) else 1)
            for name, shape in shapes.items()
        )

    def flops_per_token(self, window: int) -> float:
        """Model FLOPs for training on one token of a window: forward, and twice that backward.

        Two for each weight of a matrix that multiplies the token (of the experts, those of the
        moe_router_topk that it goes to), and two for each of the window / 2 keys (on average, under
        the causal mask) in q.k and again in the sum of values.
        """
        matrices = sum(
            math.prod(shape) * (self.moe_router_topk or 0 if name.startswith(EXPERT) else 1)
            for name, shape in self._tensor_shapes().items()
            if name.startswith(LAYER) and len(shape) == 2
        )
        attention = self.num_attention_heads * self.kv_channels * window
        layer = 2 * matrices + 2 * attention
        return 3.0 * (self.num_layers * layer + 2 * self.hidden_size * self.padded_vocab_size)

    def _tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """By Megatron's name, with `{}` for the layer's number; tied weights once."""
        shapes = family_named(self.family).tensor_shapes(
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
            vocab_size=self.vocab_size,
            padded_vocab_size=self.padded_vocab_size,
            num_experts=self.num_experts,
            moe_ffn_hidden_size=self.moe_ffn_hidden_size,
        )
        if not self.untie_embeddings_and_output_weights:
            del shapes[OUTPUT]
        return {name: tensor.shape for name, tensor in shapes.items()}

    def to_dict(self) -> dict:
        """Plain values only, for a checkpoint; a dense model's say nothing of experts."""
        values = dataclasses.asdict(self)
        if self.num_experts is None:
            for name in _OF_EXPERTS:
                del values[name]
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        known = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in values.items() if k in known}
        return cls(**values | {"rope_scaling": RopeScaling(**values.get("rope_scaling", {}))})


def check_size(name: str, value: object) -> None:
    """A size from a file must be a whole number in [1, LARGEST_SIZE].

    Raises:
        ConfigError: it is not; the sentence begins with `name`.
    """
    if type(value) is not int:
        raise ConfigError(f"{name} must be a whole number, not {value!r}"[:200])
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, not {value}")
    if value > LARGEST_SIZE:
        raise ConfigError(f"{name} {value} is more than {LARGEST_SIZE:,}")


def check_number(
    name: str, value: Any, least: float = -LARGEST_NUMBER, what: str = "a number"
) -> None:
    """A number from a file must be in [least, LARGEST_NUMBER], and neither true nor false.

    Raises:
        ConfigError: it is not; the sentence is `name` must be `what`.
    """
    if type(value) not in (int, float) or not least <= value <= LARGEST_NUMBER:
        raise ConfigError(f"{name} must be {what}, not {value!r}"[:200])
