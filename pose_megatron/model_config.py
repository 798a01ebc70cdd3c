"""The shape of a model: what a checkpoint stores; what flags, checkpoint and tokenizer agree on."""

import dataclasses
import math
from dataclasses import dataclass, field

from pose_megatron import rope_config
from pose_megatron.rope import METHODS, RopeScaling, inverse_frequencies


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model of LLaMA's kin, or of a GPT-J; rotary positions in all of them.

    `family` is the table of pose_megatron.convert by which the model came in and goes out, None
    where Hugging Face has none like it. `add_qkv_bias` (Qwen2) and `qk_layernorm` (Qwen3) add to
    LLaMA's layer; `gptj` has a layer and `baichuan` an output layer of its own.

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
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
                     "num_query_groups", "kv_channels", "vocab_size", "max_position_embeddings",
                     "make_vocab_size_divisible_by"):
            if getattr(self, name) < 1:
                raise ValueError(f"{spell(name)} must be at least 1, not {getattr(self, name)}")
        if heads % groups:
            raise ValueError(
                f"--num-attention-heads {heads} is not a multiple of --num-query-groups {groups}"
            )
        if not 0 < self.rotary_percent <= 1:
            raise ValueError(f"--rotary-percent must be in (0, 1], not {self.rotary_percent}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
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


def flag(default, help: str, choices=None, nargs=None):
    """A dataclass field that is a flag."""
    if isinstance(default, list):
        options = {"default_factory": lambda: list(default)}
    else:
        options = {"default": default}
    return field(**options, metadata={"help": help, "choices": choices, "nargs": nargs})


def spell(name: str) -> str:
    """The flag of a name: --seq-length of seq_length."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class ModelFlags:
    """Model; with --load the shape is the checkpoint's, and a flag that contradicts it an error"""

    num_layers: int | None = flag(None, "transformer layers")
    hidden_size: int | None = flag(None, "width of the residual stream")
    ffn_hidden_size: int | None = flag(None, "width of the SwiGLU MLP (default: 8/3 hidden, /64)")
    num_attention_heads: int | None = flag(None, "query heads")
    group_query_attention: bool = flag(False, "share keys and values between query heads")
    num_query_groups: int | None = flag(None, "key-value heads, with --group-query-attention")
    kv_channels: int | None = flag(None, "width of a head (default: hidden / heads)")
    vocab_size: int | None = flag(None, "tokens (default: the tokenizer's)")
    make_vocab_size_divisible_by: int | None = flag(None, "pad the vocabulary to it (128)")
    untie_embeddings_and_output_weights: bool = flag(False, "separate output layer, as in LLaMA")
    add_qkv_bias: bool = flag(False, "biases of queries, keys and values, as in Qwen2")
    qk_layernorm: bool = flag(False, "RMSNorm of each query and key head, as in Qwen3")
    norm_epsilon: float | None = flag(None, "RMSNorm epsilon (default: 1e-5)")
    init_method_std: float = flag(0.02, "standard deviation of fresh weights")
    max_position_embeddings: int | None = flag(
        None, "target window T in tokens (default: the checkpoint's, else --seq-length)")
    original_max_position_embeddings: int | None = flag(
        None, "window before extension (default: the checkpoint's T, else --seq-length)")
    rotary_base: float | None = flag(None, "RoPE theta (default: 10000)")
    rotary_percent: float | None = flag(None, "share of a head that rotates (default: 1.0)")
    rope_scaling: str | None = flag(None, "interpolation of the rotary frequencies", METHODS)
    rope_scaling_factor: float | None = flag(None, "default: T / original window")
    rope_scaling_config: str | None = flag(
        None, "JSON object, or a file with one, of what else the method takes, in Hugging Face's "
        "words: beta_fast, low_freq_factor, long_factor, attention_factor, ...")
    transformer_impl: str = flag(
        "torch", "torch runs everywhere; transformer_engine needs a GPU and the package",
        ("torch", "transformer_engine"))


def resolve_model(
    flags: ModelFlags, seq_length: int, loaded: ModelConfig | None, tokenizer_vocab: int | None
) -> ModelConfig:
    """The model that flags, checkpoint and tokenizer agree on.

    Args:
        flags: what the user wrote; None where nothing was written.
        seq_length: the window L, in tokens.
        loaded: the shape in the checkpoint, None without `--load`.
        tokenizer_vocab: size of the tokenizer, None without one.

    Raises:
        ValueError: a needed flag is missing, or a flag contradicts the checkpoint.
    """
    shape = _shape_of_flags(flags) if loaded is None else _shape_of_checkpoint(flags, loaded)
    shape.setdefault("vocab_size", tokenizer_vocab)
    if shape["vocab_size"] is None:
        raise ValueError("--vocab-size is missing: give it, or --tokenizer-model")
    if tokenizer_vocab and tokenizer_vocab > shape["vocab_size"]:
        raise ValueError(
            f"--tokenizer-model has {tokenizer_vocab} tokens, the model only "
            f"{shape['vocab_size']}: they do not belong together"
        )
    target = flags.max_position_embeddings
    if target is None:
        target = loaded.max_position_embeddings if loaded else seq_length
    shape["max_position_embeddings"] = target
    shape["rope_scaling"] = _resolve_scaling(flags, target, seq_length, loaded)
    return ModelConfig(**shape)


def _shape_of_flags(flags: ModelFlags) -> dict:
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if getattr(flags, name) is None:
            raise ValueError(f"{spell(name)} is missing: give it, or --load a checkpoint")
    hidden, heads = flags.hidden_size, flags.num_attention_heads
    if flags.kv_channels is None and hidden % heads:
        raise ValueError(
            f"--hidden-size {hidden} is not a multiple of --num-attention-heads {heads}; "
            "give --kv-channels"
        )
    if flags.num_query_groups and not flags.group_query_attention:
        raise ValueError("--num-query-groups has no effect without --group-query-attention")
    shape = {
        "num_layers": flags.num_layers,
        "hidden_size": hidden,
        # Megatron-LM's width for SwiGLU: 2/3 of 4h, in whole multiples of 64.
        "ffn_hidden_size": flags.ffn_hidden_size or max(int(hidden * 4 * 2 / 3) // 64, 1) * 64,
        "num_attention_heads": heads,
        "num_query_groups": flags.num_query_groups if flags.group_query_attention else heads,
        "kv_channels": flags.kv_channels or hidden // heads,
        "untie_embeddings_and_output_weights": flags.untie_embeddings_and_output_weights,
        "add_qkv_bias": flags.add_qkv_bias,
        "qk_layernorm": flags.qk_layernorm,
        "family": family_of(flags.add_qkv_bias, flags.qk_layernorm),
    }
    if shape["num_query_groups"] is None:
        raise ValueError("--group-query-attention needs --num-query-groups")
    for name in ("vocab_size", "make_vocab_size_divisible_by", "norm_epsilon", "rotary_base",
                 "rotary_percent"):
        if getattr(flags, name) is not None:
            shape[name] = getattr(flags, name)
    return shape


def _shape_of_checkpoint(flags: ModelFlags, loaded: ModelConfig) -> dict:
    shape = {f.name: getattr(loaded, f.name) for f in dataclasses.fields(loaded)}
    for name, value in shape.items():
        if name in ("max_position_embeddings", "rope_scaling", "family"):
            continue
        wanted = getattr(flags, name)
        if wanted not in (None, False) and wanted != value:
            raise ValueError(
                f"{spell(name)} {wanted} contradicts the checkpoint, which has {value}; "
                "leave the flag out"
            )
    return shape


def _resolve_scaling(
    flags: ModelFlags, target: int, seq_length: int, loaded: ModelConfig | None
) -> RopeScaling:
    """The scaling for the target window: the checkpoint's, a new one, or a new one over it."""
    before = loaded.rope_scaling if loaded else RopeScaling()
    asked = _asked_scaling(flags)
    if before.method == "none":
        if loaded and target > loaded.max_position_embeddings and not (
                asked or flags.rotary_base is not None):
            raise ValueError(
                f"--max-position-embeddings {target} is beyond the checkpoint's "
                f"{loaded.max_position_embeddings}: choose a --rope-scaling, such as yarn, or say "
                "--rope-scaling none to train on angles that it has never seen"
            )
        original = loaded.max_position_embeddings if loaded else seq_length
        return _new_scaling(asked, original, target)
    if all(getattr(before, name) == value for name, value in asked.items()):
        if target == loaded.max_position_embeddings:
            return before  # trained further, or resumed
    if target <= loaded.max_position_embeddings or not asked.get("method"):
        raise ValueError(
            f"the checkpoint is interpolated already, to {loaded.max_position_embeddings} "
            f"positions (--rope-scaling {before.method} --rope-scaling-factor {before.factor:g}); "
            "leave the rope flags out to train it further, or give --rope-scaling and a greater "
            "--max-position-embeddings to extend it once more"
        )
    further = target / loaded.max_position_embeddings
    if asked["method"] != before.method:
        return _new_scaling(asked, loaded.max_position_embeddings, target, over=before)
    # The same method again is one extension from the first window, by the product of both factors.
    again = {"factor": before.factor * further} | asked
    if again["factor"] < before.factor:
        raise ValueError(
            f"--rope-scaling-factor {again['factor']:g} is less than {before.factor:g}, the "
            f"checkpoint's: of the same method give the whole factor, from the first window to "
            f"{target}"
        )
    return dataclasses.replace(before, **again)


def _asked_scaling(flags: ModelFlags) -> dict:
    """Fields of RopeScaling that the flags name."""
    named = {
        "method": flags.rope_scaling,
        "factor": flags.rope_scaling_factor,
        "original_max_position_embeddings": flags.original_max_position_embeddings,
    }
    asked = rope_config.options(flags.rope_scaling_config) if flags.rope_scaling_config else {}
    for name, value in named.items():
        if value is not None and asked.setdefault(name, value) != value:
            raise ValueError(
                f"--rope-scaling-config says {name} {asked[name]!r}, another flag {value!r}"
            )
    for name in ("short_factor", "long_factor"):
        if isinstance(asked.get(name), list):
            asked[name] = tuple(asked[name])
    return asked


def _new_scaling(
    asked: dict, original: int, target: int, over: RopeScaling | None = None
) -> RopeScaling:
    if asked.get("method", "none") == "none":
        factor = asked.get("factor")
        if factor not in (None, 1.0):
            raise ValueError(f"--rope-scaling-factor {factor} needs a --rope-scaling method")
        if options := asked.keys() - {"method", "factor", "original_max_position_embeddings"}:
            raise ValueError(f"--rope-scaling-config {min(options)} needs a --rope-scaling method")
        if over is not None:
            raise ValueError(
                f"--rope-scaling none contradicts the checkpoint, which has {over.method}"
            )
        return RopeScaling()
    asked = {"original_max_position_embeddings": original} | asked
    factor = max(target / asked["original_max_position_embeddings"], 1.0)
    return RopeScaling(**{"factor": factor, "over": over} | asked)
