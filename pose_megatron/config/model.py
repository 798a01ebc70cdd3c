"""The model that flags, checkpoint and tokenizer agree on."""

import dataclasses
import math
from typing import Protocol

from pose_megatron.config.flags import ModelFlags
from pose_megatron.errors import ConfigError, flag_name
from pose_megatron.models.families import family_of
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope import huggingface
from pose_megatron.rope.scaling import RopeScaling


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
        ConfigError: a needed flag is missing, or a flag contradicts the checkpoint.
    """
    shape = _shape_of_flags(flags) if loaded is None else _shape_of_checkpoint(flags, loaded)
    shape.setdefault("vocab_size", tokenizer_vocab)
    if shape["vocab_size"] is None:
        raise ConfigError("--vocab-size is missing: give it, or --tokenizer-model")
    if tokenizer_vocab and tokenizer_vocab > shape["vocab_size"]:
        raise ConfigError(
            f"--tokenizer-model has {tokenizer_vocab} tokens, the model only "
            f"{shape['vocab_size']}: they do not belong together"
        )
    target = flags.max_position_embeddings
    if target is None:
        target = loaded.max_position_embeddings if loaded else seq_length
    shape["max_position_embeddings"] = target
    shape["rope_scaling"] = resolve_scaling(flags, target, seq_length, loaded)
    return ModelConfig(**shape)


def _shape_of_flags(flags: ModelFlags) -> dict:
    layers = _given(flags, "num_layers")
    hidden, heads = _given(flags, "hidden_size"), _given(flags, "num_attention_heads")
    if flags.kv_channels is None and hidden % heads:
        raise ConfigError(
            f"--hidden-size {hidden} is not a multiple of --num-attention-heads {heads}; "
            "give --kv-channels"
        )
    if flags.num_query_groups and not flags.group_query_attention:
        raise ConfigError("--num-query-groups has no effect without --group-query-attention")
    shape = {
        "num_layers": layers,
        "hidden_size": hidden,
        # Megatron-LM's width for SwiGLU: 2/3 of 4h, in whole multiples of 64.
        "ffn_hidden_size": flags.ffn_hidden_size or max(int(hidden * 4 * 2 / 3) // 64, 1) * 64,
        "num_attention_heads": heads,
        "num_query_groups": flags.num_query_groups if flags.group_query_attention else heads,
        "kv_channels": flags.kv_channels or hidden // heads,
        "untie_embeddings_and_output_weights": bool(flags.untie_embeddings_and_output_weights),
        "add_qkv_bias": bool(flags.add_qkv_bias),
        "qk_layernorm": bool(flags.qk_layernorm),
        "family": family_of(
            bool(flags.add_qkv_bias), bool(flags.qk_layernorm), flags.num_experts is not None
        ),
        "num_experts": flags.num_experts,
        "moe_ffn_hidden_size": flags.moe_ffn_hidden_size,
        "moe_router_topk": flags.moe_router_topk,
        "moe_router_pre_softmax": bool(flags.moe_router_pre_softmax),
    }
    if flags.num_experts is not None:
        shape["moe_ffn_hidden_size"] = flags.moe_ffn_hidden_size or shape["ffn_hidden_size"]
        shape["moe_router_topk"] = flags.moe_router_topk or 2  # Megatron-LM's
    if shape["num_query_groups"] is None:
        raise ConfigError("--group-query-attention needs --num-query-groups")
    for name in (
        "vocab_size",
        "make_vocab_size_divisible_by",
        "norm_epsilon",
        "rotary_base",
        "rotary_percent",
    ):
        if getattr(flags, name) is not None:
            shape[name] = getattr(flags, name)
    return shape


def _given(flags: ModelFlags, name: str) -> int:
    value = getattr(flags, name)
    if value is None:
        raise ConfigError(f"{flag_name(name)} is missing: give it, or --load a checkpoint")
    return value


def _shape_of_checkpoint(flags: ModelFlags, loaded: ModelConfig) -> dict:
    shape = {f.name: getattr(loaded, f.name) for f in dataclasses.fields(loaded)}
    for name, value in shape.items():
        if name in ("max_position_embeddings", "rope_scaling", "family"):
            continue
        wanted = getattr(flags, name)
        if wanted is not None and wanted != value:
            raise ConfigError(
                f"{flag_name(name)} {wanted} contradicts the checkpoint, which has {value}; "
                "leave the flag out"
            )
    return shape


class Interpolated(Protocol):
    """What an extension starts from: a ModelConfig, or as much of one."""

    @property
    def rope_scaling(self) -> RopeScaling: ...

    @property
    def max_position_embeddings(self) -> int: ...


def resolve_scaling(
    flags: ModelFlags, target: int, seq_length: int, loaded: Interpolated | None
) -> RopeScaling:
    """The scaling for the target window: the checkpoint's, a new one, or a new one over it."""
    asked = _asked_scaling(flags)
    if loaded is None:
        return _new_scaling(asked, seq_length, target)
    before, window = loaded.rope_scaling, loaded.max_position_embeddings
    if before.method == "none":
        if target > window and not (asked or flags.rotary_base is not None):
            raise ConfigError(
                f"--max-position-embeddings {target} is beyond the checkpoint's {window}: choose "
                "a --rope-scaling, such as yarn, or say --rope-scaling none to train on angles "
                "that it has never seen"
            )
        return _new_scaling(asked, window, target)
    if all(getattr(before, name) == value for name, value in asked.items()):
        if target == window:
            return before  # trained further, or resumed
    if target <= window or not asked.get("method"):
        raise ConfigError(
            f"the checkpoint is interpolated already, to {window} "
            f"positions (--rope-scaling {before.method} --rope-scaling-factor {before.factor:g}); "
            "leave the rope flags out to train it further, or give --rope-scaling and a greater "
            "--max-position-embeddings to extend it once more"
        )
    first = asked.get("original_max_position_embeddings")
    if asked["method"] != before.method:
        reached = _reached_window(before, window)
        if target <= reached and not (first or "factor" in asked):
            raise ConfigError(
                f"the checkpoint's {before.method} scaling reaches {reached} positions already: "
                f"give a greater --max-position-embeddings than {target}"
            )
        return _new_scaling(asked, reached, target, over=before)
    # The same method again is one extension from the window before any.
    again = dict(asked)
    if "factor" not in asked:
        again["factor"] = target / (first or _first_window(before, window))
    if again["factor"] < before.factor:
        raise ConfigError(
            f"--rope-scaling-factor {again['factor']:g} is less than {before.factor:g}, the "
            f"checkpoint's: with the same method, give the whole factor, from the first window "
            f"to {target}"
        )
    return dataclasses.replace(before, **again)


def _first_window(before: RopeScaling, window: int) -> float:
    """What the target is divided by: the window before any extension.

    Raises:
        ConfigError: the checkpoint does not tell it; names the flag that does.
    """
    original = before.original_max_position_embeddings
    if original is None:
        raise ConfigError(
            f"the checkpoint has {before.method} scaling by {before.factor:g} and a window of "
            f"{window}, and does not say whether that window is already extended: give "
            "--original-max-position-embeddings, the window before any extension"
        )
    if window == original or math.isclose(window, original * before.factor, rel_tol=0.01):
        return original
    if not before.interpolation.reaches_factor_times_window:
        return window / before.factor  # llama3's factor of 8 reaches 16 times the first window
    raise ConfigError(
        f"the checkpoint's {before.method} scaling by {before.factor:g} from {original} does not "
        f"give its window of {window}: say with --rope-scaling-factor how far to stretch the first "
        "window"
    )


def _reached_window(before: RopeScaling, window: int) -> int:
    """The window that a scaling reaches: some config.json leave the window as it was before."""
    if window == before.original_max_position_embeddings:
        return int(window * before.factor)
    return window


def _asked_scaling(flags: ModelFlags) -> dict:
    """The fields of RopeScaling that the flags give."""
    named = {
        "method": flags.rope_scaling,
        "factor": flags.rope_scaling_factor,
        "original_max_position_embeddings": flags.original_max_position_embeddings,
    }
    asked = huggingface.options(flags.rope_scaling_config) if flags.rope_scaling_config else {}
    for name, value in named.items():
        if value is not None and asked.setdefault(name, value) != value:
            raise ConfigError(
                f"--rope-scaling-config says {name} {asked[name]!r}, another flag {value!r}"
            )
    return {name: tuple(v) if isinstance(v, list) else v for name, v in asked.items()}


def _new_scaling(
    asked: dict, original: int, target: int, over: RopeScaling | None = None
) -> RopeScaling:
    if asked.get("method", "none") == "none":
        factor = asked.get("factor")
        if factor not in (None, 1.0):
            raise ConfigError(f"--rope-scaling-factor {factor} needs a --rope-scaling method")
        if options := asked.keys() - {"method", "factor", "original_max_position_embeddings"}:
            raise ConfigError(f"--rope-scaling-config {min(options)} needs a --rope-scaling method")
        if over is not None:
            raise ConfigError(
                f"--rope-scaling none contradicts the checkpoint, which has {over.method}"
            )
        return RopeScaling()
    asked = {"original_max_position_embeddings": original} | asked
    factor = max(target / asked["original_max_position_embeddings"], 1.0)
    return RopeScaling(**{"factor": factor, "over": over} | asked)
