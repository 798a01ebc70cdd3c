"""Flags of Megatron-LM that leave no choice here: stated facts, and what cannot be had.

The arrays of a Megatron-LM script (MODEL_ARGS, TRAINING_ARGS) can be pasted: a flag in FACTS that
states what holds anyway is accepted and has no effect, a value that contradicts it is an error.
Flags in REFUSED would change the samples or the model in a way that does not work with PoSE.
"""

import argparse
import textwrap
from collections.abc import Mapping
from typing import NamedTuple

from pose_megatron.errors import ConfigError, flag_name
from pose_megatron.runtime.ranges import real

_ONE_ROW = "its kernel takes one row of angles for a whole micro-batch; --fused-rotary has another"
REFUSED = {
    "reset_position_ids": "positions come from --position-sampler and never start again inside a "
    "sample",
    "reset_attention_mask": "samples are dense rows under a causal mask by token index",
    "sft": "packed (THD) sequences have no place for skip-wise positions",
    "mtp_num_layers": "multi-token prediction shifts tokens and not their angles",
    "apply_rope_fusion": _ONE_ROW,
    "fused_single_qkv_rope": _ONE_ROW,
    "enable_cuda_graph": "a captured graph replays the angles of other samples",
    "external_cuda_graph": "a captured graph replays the angles of other samples",
    "cuda_graph_impl": "a captured graph replays the angles of other samples",
    "use_rope_scaling": "Llama 3.1's frequencies are --rope-scaling llama3",
    "rotary_seq_len_interpolation_factor": "say --rope-scaling linear --rope-scaling-factor",
    "moe_shared_expert_intermediate_size": "no supported family has shared experts",
    "moe_layer_freq": "every layer of a mixture of experts has them",
    "expert_tensor_parallel_size": "experts are divided over the tensor ranks as all else is",
    "moe_expert_capacity_factor": "no token is dropped",
    "moe_enable_deepep": "the ranks of --expert-model-parallel-size gather tokens",
    "rotary_interleaved": "heads rotate by halves, but for the checkpoints of GPT-J",
    "apply_layernorm_1p": "norm weights are stored whole, not less one",
    "grad_reduce_in_bf16": "gradients are reduced in float32",
    "no_mmap_bin_files": "token files are memory-mapped",
    "fp16": "float16 is not supported; say --bf16",
}


class Fact(NamedTuple):
    """What holds whatever the flags say.

    Attributes:
        values: what a flag may state; one boolean makes it a switch, --name or --no-name.
        holds: the fact, as a clause.
    """

    values: tuple[bool | float | str, ...]
    holds: str


_NO_DROPOUT = "there is no dropout"
_ROTARY = "positions are rotary"
_SDPA = "attention uses fused kernels, cuDNN's or flash attention, wherever they run"
_UNFUSED = "--fused-rotary says whether rotation by position id is fused"
FACTS = {
    # The model. GPT-J and Baichuan2 checkpoints bring their own layers with --load.
    "position_embedding_type": Fact(("rope",), _ROTARY),
    "use_rotary_position_embeddings": Fact((True,), _ROTARY),
    "position_embedding": Fact((False,), "there is no table of learned positions"),
    "normalization": Fact(("RMSNorm",), "norms are RMSNorm"),
    "swiglu": Fact((True,), "the MLP is SwiGLU"),
    "disable_bias_linear": Fact((True,), "linear layers have no bias, but see --add-qkv-bias"),
    "attention_dropout": Fact((0.0,), _NO_DROPOUT),
    "hidden_dropout": Fact((0.0,), _NO_DROPOUT),
    # How it is computed.
    "use_mcore_models": Fact((True,), "models are megatron-core's"),
    "use_flash_attn": Fact((True,), _SDPA),
    "attention_softmax_in_fp32": Fact((True,), "softmax is computed in float32"),
    "masked_softmax_fusion": Fact((False,), "the attention kernel masks by itself"),
    "bias_gelu_fusion": Fact((False,), "the MLP has no GELU"),
    "bias_dropout_fusion": Fact((False,), _NO_DROPOUT),
    "rope_fusion": Fact((False,), _UNFUSED),
    "persist_layer_norm": Fact((False,), "norms use no persistent kernel"),
    "accumulate_allreduce_grads_in_fp32": Fact((True,), "gradients are reduced in float32"),
    "moe_token_dispatcher_type": Fact(
        ("allgather",), "the ranks of --expert-model-parallel-size gather tokens"
    ),
    "moe_router_load_balancing_type": Fact(
        ("aux_loss",), "experts are balanced by --moe-aux-loss-coeff"
    ),
    "moe_grouped_gemm": Fact((True,), "--transformer-impl transformer_engine groups the experts"),
    "moe_router_score_function": Fact(("softmax",), "routers weigh experts by a softmax"),
    "calculate_per_token_loss": Fact((True,), "a step's loss is the mean over its tokens"),
    "use_cpu_initialization": Fact((True,), "fresh weights do not depend on the device"),
    # Optimizer, data, checkpoints, ranks, log.
    "optimizer": Fact(("adam",), "the optimizer is Adam"),
    "weight_decay_incr_style": Fact(("constant",), "weight decay is constant"),
    "lr_warmup_init": Fact((0.0,), "warm-up starts at zero"),
    "dataloader_type": Fact(("single",), "the dataset shuffles, its samples are read in order"),
    "create_attention_mask_in_dataloader": Fact((False,), "the attention kernel masks by itself"),
    "use_checkpoint_args": Fact((True,), "with --load the shape is the checkpoint's"),
    "auto_detect_ckpt_format": Fact((True,), "--load recognises the format"),
    "use_dist_ckpt": Fact((True,), "checkpoints are written as torch_dist"),
    "ckpt_format": Fact(("torch_dist",), "checkpoints are written as torch_dist"),
    "distributed_backend": Fact(("nccl", "gloo"), "ranks talk over nccl on GPUs, else over gloo"),
    "log_throughput": Fact((True,), "the log shows TFLOP/s"),
}
# {flag: {Megatron-LM's value: ours}}
SYNONYMS = {
    "tokenizer_type": {
        "Llama2Tokenizer": "SentencePieceTokenizer",
        "GPTSentencePieceTokenizer": "SentencePieceTokenizer",
    },
    "transformer_impl": {"local": "torch"},
}


def refuse(name: str) -> None:
    """Raises ConfigError where the flag of this name is one of REFUSED."""
    if name in REFUSED:
        raise ConfigError(f"{flag_name(name)} cannot be used: {REFUSED[name]}; leave it out")


def add_facts(parser: argparse.ArgumentParser) -> None:
    """Lets the parser read FACTS, as `fact.name`; --help names them in one paragraph."""
    group = parser.add_argument_group("Megatron-LM's flags that state what holds anyway", _listed())
    hidden: dict = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    for name, fact in FACTS.items():
        group.add_argument(flag_name(name), dest=f"fact.{name}", **hidden, **fact_options(fact))


def fact_options(fact: Fact) -> dict:
    """What argparse's add_argument takes to read a statement of the fact."""
    if isinstance(fact.values[0], bool):
        return {"action": argparse.BooleanOptionalAction}
    return {"type": real(at_least=0) if isinstance(fact.values[0], float) else str}


def check_facts(given: Mapping) -> None:
    """Raises ConfigError where a value that `add_facts` made readable contradicts its fact."""
    for name, fact in FACTS.items():
        value = given.get(f"fact.{name}", fact.values[0])
        if value not in fact.values:
            raise ConfigError(
                f"{_stated(name, value)} contradicts this trainer: {fact.holds}; leave the flag out"
            )


def synonym(name: str, value: str) -> str:
    """Our word for a value that Megatron-LM calls otherwise."""
    return SYNONYMS.get(name, {}).get(value, value)


def _listed() -> str:
    """All facts as flags, in lines that keep a flag and its value together."""
    flags = ", ".join(
        _stated(name, *fact.values).replace(" ", "\0") for name, fact in FACTS.items()
    )
    return textwrap.fill(flags, 78, break_on_hyphens=False).replace("\0", " ")


def _stated(name: str, *values: bool | float | str) -> str:
    """--swiglu, --no-rope-fusion, --ckpt-format torch_dist, --distributed-backend nccl|gloo."""
    if isinstance(values[0], bool):
        return flag_name(name if values[0] else f"no_{name}")
    shown = (f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return f"{flag_name(name)} {'|'.join(shown)}"
