"""A model as Megatron-LM writes it, in a checkpoint's `args`.

    common_state  ModelConfig -> what all ranks of a Megatron-LM checkpoint share
    to_args       ModelConfig -> the Namespace in it, with every name that Megatron-LM's
                  load_args_from_checkpoint (core_v0.16.1) and Megatron-Bridge's reader of
                  Megatron-LM checkpoints look for
    from_args     the Namespace of a checkpoint trained by Megatron-LM -> ModelConfig
    from_record   what we have recorded beside the Namespace, and the Namespace -> ModelConfig

Which arguments change the function and are refused, settings.py says. Megatron-Bridge's file is
read by run_config.py.

Stock Megatron knows two scalings: llama3 with Llama 3.1's constants, and linear. Any other is
stored under our own key of the common state, and stock Megatron takes the rope for a plain one.
"""

import argparse
import dataclasses
import math
from typing import Any

from pose_megatron.checkpoints.megatron.hybrid_layout import gpt_args
from pose_megatron.checkpoints.megatron.settings import ONLY, ONLY_OF_EXPERTS, check_settings
from pose_megatron.errors import ConfigError
from pose_megatron.models.families import family_named, family_of
from pose_megatron.models.shape import ModelConfig, check_number, check_size
from pose_megatron.rope.interpolation import Pairs
from pose_megatron.rope.scaling import RopeScaling, attention_factor

# The arguments that make a LLaMA, beside those in settings.py. Where ModelConfig has a field of the
# same name, its value holds.
FIXED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "rotary_interleaved": False,
    "num_experts": None,
}
# Arguments that readers look for and that say nothing about the weights.
_EXPECTED: dict[str, Any] = {
    "add_position_embedding": True,
    "use_rotary_position_embeddings": False,
    "apply_query_key_layer_scaling": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "moe_grouped_gemm": False,
    "fp16_lm_cross_entropy": False,
    "transformer_impl": "transformer_engine",
    "no_persist_layer_norm": False,
    "bias_swiglu_fusion": True,
    "bias_gelu_fusion": True,
    "overlap_p2p_comm": False,
    "fp8_param_gather": False,
    "init_method_xavier_uniform": False,
    "config_logger_dir": "",
    "cp_comm_type": ["p2p"],
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "expert_model_parallel_size": 1,
    "context_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "spec": None,
    "consumed_valid_samples": 0,
    "skipped_train_samples": 0,
    "data_parallel_random_init": False,
    "ckpt_format": "torch_dist",
    "ckpt_fully_parallel_save": False,
    "async_strategy": "mcore",
}


def to_args(model: ModelConfig, iteration: int, consumed_samples: int, **run) -> argparse.Namespace:
    """Megatron-LM's arguments for a run: the model, its progress, and `run` (layout, precision)."""
    scaling, base = model.rope_scaling, model.rotary_base
    own = {}
    if scaling.over is None:
        own = scaling.interpolation.to_megatron(Pairs.unscaled(model.rotary_dim, base))
        base = own.pop("rotary_base", base)
    shape = {k: v for k, v in model.to_dict().items() if k != "rope_scaling"}
    if model.num_experts is not None:
        # Whether to group their products is for the run that loads them: None leaves its flag.
        shape |= _defaults(ONLY_OF_EXPERTS) | {"moe_grouped_gemm": None}
    rope = {
        "rotary_base": int(base) if base == int(base) else base,
        "position_embedding_type": "rope",
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "rotary_seq_len_interpolation_factor": None,
    } | own
    return argparse.Namespace(
        **FIXED
        | _defaults(ONLY)
        | _EXPECTED
        | shape
        | rope
        | family_named(model.family).megatron_args()
        | {
            "padded_vocab_size": model.padded_vocab_size,
            "group_query_attention": model.num_query_groups != model.num_attention_heads,
            "layernorm_epsilon": model.norm_epsilon,
            "seq_length": model.max_position_embeddings,
            "iteration": iteration,
            "consumed_train_samples": consumed_samples,
        }
        | run
    )


def _defaults(only: dict[str, tuple]) -> dict[str, Any]:
    return {name: values[0] for name, values in only.items()}


def common_state(
    model: ModelConfig, iteration: int, consumed_samples: int, record: dict | None = None, **run
) -> dict:
    """What all ranks of a Megatron-LM checkpoint share, and our own key.

    Args:
        record: what else to keep under our own key.
        run: further arguments under Megatron-LM's names: layout, precision.
    """
    return {
        "args": to_args(model, iteration, consumed_samples, **run),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "num_floating_point_operations_so_far": 0,
        "pose_megatron": {"model": model.to_dict()} | (record or {}),
    }


def from_args(args: dict, embedding_rows: int, all_are_the_models: bool = False) -> ModelConfig:
    """The model in a checkpoint that Megatron-LM wrote.

    Args:
        args: the checkpoint's Namespace, as a dict.
        embedding_rows: rows of the stored word embedding, padding included.
        all_are_the_models: as in `settings.check_settings`.

    Raises:
        ConfigError: the model is not a LLaMA, Qwen2 or Qwen3, Mixtral or Qwen3-MoE, or has a
            setting that our layers do not compute; names the argument.
    """
    args = gpt_args(args)
    ours = {field.name for field in dataclasses.fields(ModelConfig)}
    for name, only in FIXED.items():
        if name not in ours and args.get(name, only) != only:
            raise ConfigError(f"{name} {args[name]!r} is not supported, only {only!r} is")
    if missing := [
        name
        for name in ("num_layers", "hidden_size", "num_attention_heads")
        if args.get(name) is None
    ]:
        raise ConfigError(f"{missing[0]} is missing")
    _check_types(args)
    heads = args["num_attention_heads"]
    channels = args.get("kv_channels") or args["hidden_size"] // heads
    has_experts = args.get("num_experts") is not None
    check_settings(args, _scales(args, channels), has_experts, all_are_the_models)
    if has_experts and args.get("moe_router_topk") is None:
        raise ConfigError(
            f"num_experts {args['num_experts']} needs moe_router_topk, which is missing"
        )
    if not has_experts:  # the parser's defaults, which say nothing
        ours = {name for name in ours if not name.startswith("moe_")}
    shape = {
        name: args[name] for name in ours - {"rope_scaling", "family"} if args.get(name) is not None
    }
    shape["norm_epsilon"] = _norm_epsilon(args)
    if has_experts:
        shape.setdefault("moe_ffn_hidden_size", shape["ffn_hidden_size"])
    shape.setdefault("kv_channels", channels)
    # Megatron-LM pads the vocabulary to a multiple that grows with the tensor ranks.
    vocab_size = min(shape.get("vocab_size", embedding_rows), embedding_rows)
    divisor = shape.get("make_vocab_size_divisible_by", 128)
    divisors = (divisor, divisor * args.get("tensor_model_parallel_size", 1), embedding_rows)
    shape["make_vocab_size_divisible_by"] = next(
        d for d in divisors if -(-vocab_size // d) * d == embedding_rows
    )
    return ModelConfig(
        **shape
        | {
            "vocab_size": vocab_size,
            "num_query_groups": (
                args["num_query_groups"] if args.get("group_query_attention") else heads
            ),
            "max_position_embeddings": args.get("max_position_embeddings") or args["seq_length"],
            "rotary_base": float(args.get("rotary_base") or 10000),
            "rope_scaling": _scaling(args),
            "family": family_of(
                bool(args.get("add_qkv_bias")), bool(args.get("qk_layernorm")), has_experts
            ),
        }
    )


_SIZES = (
    *("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "kv_channels"),
    *("seq_length", "max_position_embeddings", "vocab_size", "make_vocab_size_divisible_by"),
    *("num_experts", "moe_ffn_hidden_size", "moe_router_topk", "tensor_model_parallel_size"),
)
_NUMBERS = (
    *("norm_epsilon", "layernorm_epsilon", "rotary_base", "rotary_percent"),
    *("rope_scaling_factor", "rotary_seq_len_interpolation_factor", "yarn_rotary_scaling_factor"),
    *("rotary_scaling_factor", "yarn_original_max_position_embeddings", "yarn_beta_fast"),
    *("yarn_beta_slow", "yarn_mscale", "yarn_mscale_all_dim"),
)


def _check_types(args: dict) -> None:
    """That what is counted with are numbers; None stands for a default."""
    for name in _SIZES:
        if args.get(name) is not None:
            check_size(name, args[name])
    for name in _NUMBERS:
        if args.get(name) is not None:
            check_number(name, args[name])


def from_record(record: dict, args: dict) -> ModelConfig:
    """The model that we have recorded in a checkpoint, where its args say no other function.

    Raises:
        ConfigError: they do; names the argument.
    """
    model = ModelConfig.from_dict(record)
    ours, args = vars(to_args(model, 0, 0)), gpt_args(args)
    for name in FIXED:
        if args.get(name, ours[name]) != ours[name]:
            raise ConfigError(
                f"{name} {args[name]!r} contradicts the model that the checkpoint records, which "
                f"has {ours[name]!r}"
            )
    scale = attention_factor(model.rope_scaling) ** 2 * model.kv_channels**-0.5
    also = _scales(args, model.kv_channels, scale)
    check_settings(args, also, model.num_experts is not None, all_are_the_models=False)
    return model


def _scales(args: dict, channels: int, scale: float | None = None) -> dict[str, tuple[Any, ...]]:
    """The stored softmax_scale, if it is `scale` or the default spelt out: what check_settings
    accepts beside None."""
    given, wanted = args.get("softmax_scale"), scale or channels**-0.5
    same = isinstance(given, float) and math.isclose(given, wanted, rel_tol=1e-6)
    return {"softmax_scale": (given,)} if same else {}


def _norm_epsilon(args: dict) -> float:
    """Megatron-LM calls it norm_epsilon before 0.16.1, and layernorm_epsilon from then on."""
    names = ("norm_epsilon", "layernorm_epsilon")
    found = {name: args[name] for name in names if args.get(name) is not None}
    if len(set(found.values())) > 1:
        raise ConfigError(
            " and ".join(f"{name} {value}" for name, value in found.items()) + " contradict"
        )
    return float(next(iter(found.values()), 1e-5))


def _scaling(args: dict) -> RopeScaling:
    """The scaling that megatron-core computes; llama3 and linear can act together."""
    kind = args.get("position_embedding_type")
    if kind not in ("rope", "yarn"):
        raise ConfigError(f"position_embedding_type {kind!r} is not supported, only rope and yarn")
    window = args.get("max_position_embeddings") or args["seq_length"]
    scaling = _yarn(args) if kind == "yarn" else RopeScaling()
    if kind == "rope" and args.get("use_rope_scaling"):
        scaling = RopeScaling("llama3", float(args.get("rope_scaling_factor") or 8.0), 8192)
    linear = args.get("rotary_seq_len_interpolation_factor")
    if linear in (None, 1) or kind == "yarn":  # megatron-core's yarn leaves it out
        return scaling
    over = None if scaling.method == "none" else scaling
    return RopeScaling("linear", float(linear), max(int(window / linear), 1), over=over)


def _yarn(args: dict) -> RopeScaling:
    def value(name: str, default):
        found = args.get(f"yarn_{name}")
        return default if found is None else found

    factor = args.get("yarn_rotary_scaling_factor") or args.get("rotary_scaling_factor")
    original = args.get("yarn_original_max_position_embeddings")
    if factor is None or original is None:
        raise ConfigError(
            "position_embedding_type 'yarn' needs yarn_rotary_scaling_factor and "
            f"yarn_original_max_position_embeddings, which are {factor} and {original}"
        )
    top, bottom = value("mscale", None), value("mscale_all_dim", None)
    temperature = None
    if not (top is None or bottom is None or (top, bottom) == (1.0, 0.0)):
        step = 0.1 * math.log(factor)
        temperature = (step * top + 1) / (step * bottom + 1)
    return RopeScaling(
        "yarn",
        float(factor),
        original,
        beta_fast=float(value("beta_fast", 32.0)),
        beta_slow=float(value("beta_slow", 1.0)),
        truncate=bool(value("correction_range_round_to_int", True)),
        attention_factor=temperature,
    )
