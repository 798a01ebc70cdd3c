"""A model as Megatron writes it: Megatron-LM's `args` and Megatron-Bridge's run_config.yaml.

    common_state     ModelConfig -> what all ranks of a Megatron-LM checkpoint share
    to_args          ModelConfig -> the Namespace in it, with every name that Megatron-LM's
                     load_args_from_checkpoint (core_v0.16.1) and Megatron-Bridge's reader of
                     Megatron-LM checkpoints look for
    from_args        the Namespace of a checkpoint trained by Megatron-LM -> ModelConfig
    from_run_config  Megatron-Bridge's `model` section -> ModelConfig

Stock Megatron knows two scalings: llama3 with Llama 3.1's constants, and linear. Any other is
stored under our own key of the common state, and stock Megatron takes the rope for a plain one.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

from pose_megatron.checkpoints.megatron.hybrid_layout import gpt_args
from pose_megatron.errors import ConfigError
from pose_megatron.models.families import family_named, family_of
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.interpolation import Pairs
from pose_megatron.rope.scaling import RopeScaling
from pose_megatron.runtime.json_files import read_yaml

# The arguments that make a LLaMA. Where ModelConfig has a field of the same name, its value holds.
FIXED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "squared_relu": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "rotary_interleaved": False,
    "apply_layernorm_1p": False,
    "multi_latent_attention": False,
    "num_experts": None,
    "mtp_num_layers": None,
    "heterogeneous_layers_config_path": None,
    "hybrid_override_pattern": None,
    "is_hybrid_model": False,
    "no_rope_freq": None,
    "window_size": None,
}
# What makes its mixture of experts that of a family, where it has one.
FIXED_OF_EXPERTS: dict[str, Any] = {
    "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": None,
    "moe_latent_size": None,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_topk_limited_devices": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_apply_probs_on_input": False,
    "moe_expert_capacity_factor": None,
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
        shape |= FIXED_OF_EXPERTS | {"moe_grouped_gemm": None}
    rope = {
        "rotary_base": int(base) if base == int(base) else base,
        "position_embedding_type": "rope",
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "rotary_seq_len_interpolation_factor": None,
    } | own
    return argparse.Namespace(
        **FIXED
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


def common_state(model: ModelConfig, iteration: int, consumed_samples: int, **run) -> dict:
    """What all ranks of a Megatron-LM checkpoint share, and our own key.

    Args:
        run: further arguments under Megatron-LM's names: layout, precision.
    """
    return {
        "args": to_args(model, iteration, consumed_samples, **run),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "num_floating_point_operations_so_far": 0,
        "pose_megatron": {"model": model.to_dict()},
    }


def from_args(args: dict, embedding_rows: int) -> ModelConfig:
    """The model in a checkpoint that Megatron-LM wrote.

    Args:
        args: the checkpoint's Namespace, as a dict.
        embedding_rows: rows of the stored word embedding, padding included.

    Raises:
        ConfigError: the model is not a LLaMA, Qwen2 or Qwen3, Mixtral or Qwen3-MoE; names the
            argument.
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
    has_experts = args.get("num_experts") is not None
    if has_experts:
        _check_experts(args)
    else:  # the parser's defaults, which say nothing
        ours = {name for name in ours if not name.startswith("moe_")}
    shape = {
        name: args[name] for name in ours - {"rope_scaling", "family"} if args.get(name) is not None
    }
    shape["norm_epsilon"] = _norm_epsilon(args)
    if has_experts:
        shape.setdefault("moe_ffn_hidden_size", shape["ffn_hidden_size"])
    heads = args["num_attention_heads"]
    shape.setdefault("kv_channels", args["hidden_size"] // heads)
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


def _norm_epsilon(args: dict) -> float:
    """Megatron-LM calls it norm_epsilon before 0.16.1, and layernorm_epsilon from then on."""
    names = ("norm_epsilon", "layernorm_epsilon")
    found = {name: args[name] for name in names if args.get(name) is not None}
    if len(set(found.values())) > 1:
        raise ConfigError(
            " and ".join(f"{name} {value}" for name, value in found.items()) + " contradict"
        )
    return float(next(iter(found.values()), 1e-5))


def _check_experts(args: dict) -> None:
    experts = args["num_experts"]
    if args.get("moe_router_topk") is None:
        raise ConfigError(f"num_experts {experts} needs moe_router_topk, which is missing")
    for name, only in FIXED_OF_EXPERTS.items():
        value = args.get(name, only)
        if name == "moe_layer_freq" and value == [1] * args["num_layers"]:
            continue  # every layer, said one by one
        if value != only:
            raise ConfigError(
                f"num_experts {experts} with {name} {value!r} is not supported, only {only!r} is"
            )
    if "sinkhorn" in (args.get("moe_router_load_balancing_type") or ()):
        raise ConfigError(
            f"num_experts {experts} with moe_router_load_balancing_type 'sinkhorn' is not "
            "supported: it weighs the experts otherwise"
        )


def read_run_config(path: Path, embedding_rows: int) -> tuple[ModelConfig, dict]:
    """The model in Megatron-Bridge's run_config.yaml, and arguments of the run by Megatron-LM's
    names; errors as in from_args, or the file is no such YAML."""
    config = read_yaml(path)
    model = _flat(config)
    run = {
        name: model.get(name, 1)
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    }
    run["use_distributed_optimizer"] = bool(
        (config.get("optimizer") or {}).get("use_distributed_optimizer")
    )
    return from_run_config(config, embedding_rows), run


def from_run_config(config: dict, embedding_rows: int) -> ModelConfig:
    """The model in a checkpoint that Megatron-Bridge wrote.

    Args:
        config: the content of run_config.yaml.
        embedding_rows: rows of the stored word embedding, padding included.

    Raises:
        ConfigError: as in from_args.
    """
    model = _flat(config)
    activation = model.get("activation_func")
    if isinstance(activation, dict):
        activation = activation.get("_target_")
    names = {
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "vocab_size",
        "make_vocab_size_divisible_by",
        "seq_length",
        "normalization",
        "add_bias_linear",
        "add_qkv_bias",
        "qk_layernorm",
        "rotary_base",
        "rotary_percent",
        "rotary_interleaved",
        "multi_latent_attention",
        "mtp_num_layers",
        "window_size",
        "position_embedding_type",
        "hybrid_layer_pattern",
        "hybrid_override_pattern",
        "tensor_model_parallel_size",
        "yarn_rotary_scaling_factor",
        "yarn_original_max_position_embeddings",
        "yarn_beta_fast",
        "yarn_beta_slow",
        "yarn_mscale",
        "yarn_mscale_all_dim",
        "yarn_correction_range_round_to_int",
        "rope_scaling_factor",
        "moe_ffn_hidden_size",
        "moe_router_topk",
        "moe_router_pre_softmax",
        "moe_router_load_balancing_type",
        *FIXED_OF_EXPERTS,
    }
    args = {name: model[name] for name in names if model.get(name) is not None}
    return from_args(
        args
        | {
            "swiglu": bool(model.get("gated_linear_unit")) and "silu" in str(activation),
            "norm_epsilon": model.get("layernorm_epsilon", 1e-5),
            "untie_embeddings_and_output_weights": not model.get(
                "share_embeddings_and_output_weights", True
            ),
            "group_query_attention": model.get("num_query_groups") is not None,
            "use_rope_scaling": bool(model.get("rope_scaling")),
            "rotary_seq_len_interpolation_factor": model.get("seq_len_interpolation_factor"),
            "num_experts": model.get("num_moe_experts"),
        },
        embedding_rows,
    )


def _flat(config: dict) -> dict:
    model = config.get("model")
    if not isinstance(model, dict):
        raise ConfigError("run_config.yaml has no model section")
    return {**model, **(model.get("transformer") or {})}  # a section inside it in later releases


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
