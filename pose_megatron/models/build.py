"""Building a model with megatron-core: its configuration, this rank's stage, fresh weights."""

import hashlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from pose_megatron.models import weight_gradients
from pose_megatron.models.families import family_named
from pose_megatron.models.gpt import PoseGPTModel, PoseModel, softmax_scale
from pose_megatron.models.shape import ModelConfig
from pose_megatron.runtime.device import device
from pose_megatron.runtime.megatron_core import require_hybrid


def transformer_config(
    model: ModelConfig,
    *,
    bf16: bool = False,
    transformer_impl: str = "torch",
    attention_backend: str = "auto",
    bias_swiglu_fusion: bool = True,
    gradient_accumulation_fusion: bool = False,
    model_class: str = "gpt",
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    sequence_parallel: bool = False,
    moe_aux_loss_coeff: float = 0.0,
    **recompute,
) -> TransformerConfig:
    """megatron-core's configuration of a model: its shape, layout and precision.

    Args:
        model: shape and rope.
        transformer_impl: `torch` or `transformer_engine`.
        attention_backend: of Transformer Engine: `auto`, `flash`, `fused` or `unfused`.
        bias_swiglu_fusion: whether a GPU runs SwiGLU as one kernel each way. A CPU does not:
            uncompiled, its backward pass would round every step to the weights' precision.
        gradient_accumulation_fusion: whether weight_gradients.py's product adds them up, on a GPU,
            in bfloat16, with `torch`.
        model_class: `gpt`, or `hybrid`, which has two layers for each of the model's.
        sequence_parallel: has no effect on one tensor rank.
        moe_aux_loss_coeff: weight of the loss that spreads the tokens over the experts.
        recompute: megatron-core's recompute_granularity, _method, _num_layers and _modules.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    interleaved = virtual_pipeline_model_parallel_size is not None
    family = family_named(model.family)
    on_gpu = device().type != "cpu"
    swiglu = family.gated_mlp and family.activation is F.silu
    accumulates = gradient_accumulation_fusion and on_gpu and bf16 and transformer_impl == "torch"
    experts: dict[str, Any] = {}
    if model.num_experts is not None:
        experts = {
            "num_moe_experts": model.num_experts,
            "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
            "moe_router_topk": model.moe_router_topk,
            "moe_router_pre_softmax": model.moe_router_pre_softmax,
            "moe_aux_loss_coeff": moe_aux_loss_coeff,
            "moe_grouped_gemm": transformer_impl == "transformer_engine",
            # Gloo has no all-to-all of unequal parts.
            "moe_token_dispatcher_type": "allgather",
        }
    layers = 2 if model_class == "hybrid" else 1
    if recompute.get("recompute_num_layers"):
        recompute["recompute_num_layers"] *= layers
    return TransformerConfig(
        **family.transformer_settings(),
        num_layers=layers * model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.norm_epsilon,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_backend=AttnBackend[attention_backend],
        softmax_scale=softmax_scale(model.kv_channels, model.rotary_percent, model.rope_scaling),
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        **experts,
        # Interleaved stages without overlapped sends give wrong numbers, silently.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,  # a wait for the GPU that PyTorch before 2.0 needed
        sequence_parallel=sequence_parallel and tensor_model_parallel_size > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        use_cpu_initialization=not torch.cuda.is_available(),
        **recompute,
        # Sum over tokens, divided once by the tokens of the whole batch: the only form in which
        # every layout has the same gradient.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        bias_activation_fusion=bias_swiglu_fusion and swiglu and on_gpu,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=accumulates and weight_gradients.install(),
    )


def build_model(
    config: TransformerConfig,
    model: ModelConfig,
    transformer_impl: str = "torch",
    vp_stage: int | None = None,
    model_class: str = "gpt",
    fused_rotary: str = "off",
    fused_cross_entropy: str = "off",
) -> PoseModel:
    """This rank's pipeline stage, on its device; `initialize` or a checkpoint sets its weights.

    Both classes have the same weights and the same checkpoints.

    Args:
        config: what `transformer_config` returns for the same model and class.
        vp_stage: model chunk of an interleaved pipeline's stage, else None.
        model_class: `gpt` or `hybrid`.
        fused_rotary, fused_cross_entropy: as PoseGPTModel's; what only reads with a model need not
            ask for them.

    Raises:
        ConfigError: megatron-core is too old for `hybrid`, or the family's layers do not fit it, or
            a kernel cannot be `on`.
    """
    family = family_named(model.family)
    layers = family.layer_spec(config, transformer_impl, vp_stage)
    build: Callable[..., PoseModel] = partial(PoseGPTModel, config, layers)
    if model_class == "hybrid":
        require_hybrid()
        from pose_megatron.models import hybrid

        build = partial(
            hybrid.PoseHybridModel,
            config,
            hybrid.hybrid_stack_spec(config, transformer_impl, layers),
            hybrid_layer_pattern=hybrid.layer_pattern(config),
        )
    stage = build(
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        post_process=parallel_state.is_pipeline_last_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        vp_stage=vp_stage,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        rope_scaling=model.rope_scaling,
        fused_rotary=fused_rotary,
        fused_cross_entropy=fused_cross_entropy,
    )
    if stage.post_process:
        family.adapt_output_layer(stage.output_layer)
    return stage.to(device())


@torch.no_grad()
def initialize(stage: PoseModel, seed: int, std: float, num_layers: int) -> None:
    """Sets fresh weights, the same for every layout of ranks.

    Each weight is drawn whole from a generator keyed by (seed, name, layer), and every rank keeps
    its shard. Weights are normal with standard deviation `std`, projections into the residual
    stream with std / sqrt(2 * num_layers) (Radford et al., 2019), as in Megatron-LM; norms are one
    and biases zero.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharded = stage.sharded_state_dict(metadata={"dp_cp_group": group})
    found, _ = extract_sharded_tensors_and_factories(sharded)
    for entry in _flat(found):
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts:
            _fill(part, seed, std, num_layers)


def _flat(tree):
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _flat(value)
    else:
        yield tree


def _fill(part: ShardedTensor, seed: int, std: float, num_layers: int) -> None:
    if "norm" in part.key:
        return
    if part.key.endswith(".bias"):
        part.data.zero_()
        return
    axes = part.prepend_axis_num
    layer, offset = part.global_offset[:axes], part.global_offset[axes:]
    if part.key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * num_layers)
    name = f"{seed} {part.key} {layer}".encode()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(hashlib.blake2b(name, digest_size=7).digest()))
    whole = torch.empty(part.global_shape[axes:]).normal_(0, std, generator=generator)
    shard = tuple(slice(o, o + n) for o, n in zip(offset, part.local_shape, strict=True))
    part.data.copy_(whole[shard])
