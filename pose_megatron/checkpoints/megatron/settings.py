"""What Megatron's settings say about a model's function, so that none of them is ever dropped.

    READ       the settings that args.py takes into ModelConfig
    ONLY       those of which our layers compute one value alone, megatron-core's default
    HARMLESS   those that say nothing about the function: training, logging, layout of ranks,
               precision, kernels, and details of a part that ONLY rules out

Every field of megatron-core's TransformerConfig, 0.16.1 to 0.19.2, is in one of them; a test holds
that. A name in none of them was written by another version, by a fork or by a user's own program:

- In the model section of a run_config.yaml, where all is about the model, any value but None,
  False or an empty one is refused.
- Megatron-LM's args hold hundreds of flags of the run, and programs add their own. There a name is
  refused with such a value where a word of it is about the model (_WORDS).
"""

import re
from collections.abc import Mapping
from typing import Any

from pose_megatron.errors import ConfigError

READ = frozenset(
    """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups
    group_query_attention kv_channels vocab_size padded_vocab_size make_vocab_size_divisible_by
    seq_length max_position_embeddings untie_embeddings_and_output_weights norm_epsilon
    layernorm_epsilon rotary_base rotary_percent use_rope_scaling rope_scaling_factor
    rotary_seq_len_interpolation_factor position_embedding_type yarn_rotary_scaling_factor
    rotary_scaling_factor yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow
    yarn_mscale yarn_mscale_all_dim yarn_correction_range_round_to_int normalization swiglu
    add_bias_linear add_qkv_bias qk_layernorm rotary_interleaved num_experts moe_ffn_hidden_size
    moe_router_topk moe_router_pre_softmax moe_layer_freq rope_scaling family
    hybrid_layer_pattern num_moe_experts gated_linear_unit activation_func
    share_embeddings_and_output_weights seq_len_interpolation_factor""".split()
)
# By name, the values that mean what our layers compute; the first is said in messages.
ONLY: dict[str, tuple[Any, ...]] = {
    # Attention. For softmax_scale, args.py adds the default spelt out.
    "softmax_scale": (None,),
    "softmax_type": ("vanilla",),
    "window_size": (None, (-1, -1), (-1, 0)),
    "qk_l2_norm": (False,),
    "qk_clip": (False,),  # rescales weights at every step of training
    "attention_output_gate": (False,),
    "no_rope_freq": (None, 0),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "use_arbitrary_attention_mask": (None, False),
    # Norms, activations, residuals.
    "layernorm_zero_centered_gamma": (False,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    # The stack of layers.
    "use_mup": (False,),
    "mtp_num_layers": (None, 0),
    "heterogeneous_block_specs": (False,),
    "heterogeneous_layers_config_path": (None, ""),
    "heterogeneous_layers_config_encoded_json": (None, ""),
    "hybrid_override_pattern": (None,),
    "is_hybrid_model": (False,),
    "retro_add_retriever": (False,),
}
# The same for models with a mixture of experts; without one they mean nothing.
ONLY_OF_EXPERTS: dict[str, tuple[Any, ...]] = {
    "moe_layer_freq": (1,),
    "moe_shared_expert_intermediate_size": (None, 0),
    "moe_shared_expert_gate": (False,),
    "moe_latent_size": (None,),
    "moe_router_score_function": ("softmax",),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_router_topk_limited_devices": (None,),
    "moe_router_num_groups": (None,),
    "moe_router_group_topk": (None,),
    "moe_router_force_load_balancing": (False,),
    "moe_router_force_biased": (None,),
    "moe_input_jitter_eps": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_expert_capacity_factor": (None,),
    "moe_expert_rank_capacity_factor": (None,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_shared_expert_glu_interleave_size": (None,),
}
# How experts are kept equally busy while they train; sinkhorn weighs them otherwise.
_BALANCINGS = {"aux_loss", "seq_aux_loss", "global_aux_loss", "none"}

HARMLESS = frozenset(
    """account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    activation_func_fp8_input_store activation_offload_fraction activations_checkpoint_num_layers
    add_position_embedding apply_query_key_layer_scaling apply_rope_fusion
    apply_wd_to_qk_layernorm async_tensor_model_parallel_allreduce attention_backend
    attention_dropout attention_softmax_in_fp32 autocast_dtype barrier_with_L1_time
    batch_invariant_mode batch_p2p_comm batch_p2p_sync bf16 bias_activation_fusion
    bias_dropout_add_fusion bias_dropout_fusion bias_gelu_fusion bias_swiglu_fusion
    block_data_path bos_token_id calculate_per_token_loss
    check_weight_hash_across_dp_replicas_interval
    checkpoint_num_layers clip_grad clone_scatter_output_in_embedding config_logger_dir
    context_parallel_size cp_comm_type cpu_offloading create_attention_mask_in_dataloader
    cross_entropy_fusion_impl cross_entropy_loss_fusion data_parallel_random_init
    deallocate_pipeline_outputs defer_embedding_wgrad_compute delay_offload_until_cuda_graph
    delay_wgrad_compute delta_offload_bytes_across_pp_ranks dense_grouped_gemm deterministic_mode
    disable_bf16_reduced_precision_matmul disable_mamba_mem_eff_path
    disable_parameter_transpose_cache distribute_saved_activations dynamic_loss_scale
    embedding_init_method embedding_init_method_std embedding_path enable_autocast
    enable_cuda_graph eod_mask_loss eos_token_id ep_overlap_early_attn_memory_release
    expert_gtp_weight_remat_size expert_model_parallel_size
    expert_tensor_parallel_num_weight_shards expert_tensor_parallel_size external_cuda_graph
    finalize_model_grads_func fine_grained_activation_offloading
    fine_grained_offloading_max_inflight_offloads first_last_layers_bf16 flash_attention_version
    flash_decode fp16 fp16_lm_cross_entropy fp32_residual_connection fp4 fp8
    freeze_all_layers fused_cross_entropy fused_residual_rmsnorm fused_rotary
    fused_single_qkv_rope generation_config
    grad_scale_func grad_sync_func gradient_accumulation_fusion gtp_weight_remat_size head_lr_mult
    hetereogenous_dist_checkpoint hf_model_id hf_model_revision hidden_dropout
    hierarchical_context_parallel_sizes high_priority_a2a_comm_stream hybrid_context_parallel
    init_method init_method_std init_model_with_meta_device initial_loss_scale iterations_to_skip
    kitchen_attention_backend local_rank logit_dtype loss_scale loss_scale_window
    mask_factor mask_prob mask_type masked_softmax_fusion max_seqlen_per_dp_cp_rank
    memory_efficient_layer_norm microbatch_group_size_per_vp_stage min_loss_scale
    min_offloaded_tensor_size mixed_precision_wrapper mlp_chunks_for_prefill
    mlp_chunks_for_training mrope_section nccl_all_reduce_for_prefill no_persist_layer_norm
    no_sync_func num_channels num_layers_at_end_in_bf16 num_layers_at_start_in_bf16
    num_microbatches_with_partial_activation_checkpoints offload_modules
    offset_sampling_seed_by_dp_rank openai_gelu output_bert_embeddings output_layer_init_method
    pad_vocab_size parallel_output param_sync_func params_dtype perform_initialization
    persist_layer_norm pipeline_dtype q_lora_rank qk_clip_alpha qk_clip_threshold qk_head_dim
    qk_pos_emb_head_dim quant_recipe query_in_block_prob rank recompute_granularity
    report_topk_accuracies reset_attention_mask reset_position_ids restore_modelopt_state
    rope_type save_tokens_per_expert_interval scaled_masked_softmax_fusion
    scaled_upper_triang_masked_softmax_fusion scatter_embedding_sequence_parallel
    sequence_parallel should_pad_vocab skip_train standalone_embedding_stage symmetric_ar_type
    te_rng_tracker tensor_parallel_num_weight_shards test_mode timers tp_only_amax_red
    transformer_impl transformer_pipeline_model_parallel_size use_cpu_initialization
    use_flash_attn use_fused_weighted_squared_relu use_inference_optimized_layers use_kitchen
    use_layer_wise_distributed_optimizer use_layer_wise_param_layout use_mamba_mem_eff_path
    use_megatron_fsdp use_ring_exchange_p2p use_rotary_position_embeddings use_te_activation_func
    use_te_rng_tracker use_torch_fsdp2 use_transformer_engine_full_layer_spec
    use_transformer_engine_op_fuser v_head_dim variable_seq_lengths vocab_extra_ids vocab_file
    wgrad_deferral_limit window_attn_skip_freq wrap_with_ddp beta_fast beta_slow mscale
    mscale_all_dim original_max_position_embeddings moe_aux_loss_coeff moe_z_loss_coeff
    experimental_attention_variant_loss_scale_func moe_paged_stash moe_enable_deepep
    moe_enable_routing_replay moe_extended_tp moe_grad_scale_func
    moe_grouped_gemm moe_layer_recompute moe_router_bias_update_rate moe_router_dtype
    moe_router_fusion moe_router_load_balancing_type moe_router_padding_for_fp8
    moe_router_padding_for_quantization moe_router_quantile_balancing_ema
    moe_shared_expert_overlap moe_token_dispatcher_type moe_token_drop_policy
    moe_per_layer_logging moe_upcycling_granularity moe_use_upcycling moe_use_legacy_grouped_gemm
    moe_token_dropping""".split()
)
# Whole families of such names, by how they begin or end.
_HARMLESS = re.compile(
    r"_|(bert|biencoder|bpe|cache_mla|cpu_offloading|cuda_graph|data|dataloader|decoder|dino|dsa"
    r"|encoder|fault_injector|fp4|fp8|grpo|ict|indexer|inference|kv_lora|linear|log"
    r"|logits_load|logits_save|lr|mamba|mla|moe_(deepep|flex|hybridep|ncclep|pad|paged_stash"
    r"|permute|routing_trace|single_grouped)|mtp|muon|mup|num_layers_in|num_layers_per"
    r"|num_virtual_stages|overlap|pipeline_model_parallel|recompute|relative_attention|retriever"
    r"|retro|rl|tensor_model_parallel|tp_comm|use_grouped_gemm|use_kitchen"
    r"|virtual_pipeline_model_parallel|vision|swin)_"
)
_WORDS = re.compile(
    r"(?:^|_)(activation|alibi|attn|attention|bias|bidirectional|cap|capping|causal|channels|clamp"
    r"|clip|conv|cross|dropout|embed(ding)?s?|experts?|ffn|freq|gated?|ge?glu|gelu|glu|heads?"
    r"|heterogeneous|hidden|hyper|interleaved?|keys?|kv|latent|layers?|layernorm|linear|ln|logits?"
    r"|loop|lora|mamba|mask|mlp|moe|mrope|mtp|mult|multiplier|mup|norms?|normalization|offset"
    r"|position|positional|pos|qk|qkv|query|queries|relu|residual|retro|rmsnorm|rope|rotary"
    r"|router|routing|scal(e|ed|ing)|share|shared|sinks?|skip|sliding|soft(cap|capping|max)"
    r"|sparse|spec|ssm|swiglu|tied?|topk|untie|values?|vocab|window|yarn)(?:_|$)"
)
_WAY_OUT = (
    "the model would compute something else; convert it with the program that trained it, or train "
    "without it"
)


def check_settings(
    settings: Mapping[str, Any],
    also: Mapping[str, tuple[Any, ...]],
    has_experts: bool,
    all_are_the_models: bool,
) -> None:
    """Refuses every setting that changes a model's function and that our layers do not compute.

    Args:
        settings: Megatron-LM's args, or a model section by their names.
        also: values that mean what our layers compute for this model, beside those in ONLY.
        all_are_the_models: whether an unknown name says something of the model, whatever it is.

    Raises:
        ConfigError: names the setting, its value and the way out.
    """
    only = ONLY | (ONLY_OF_EXPERTS if has_experts else {})
    for name, given in settings.items():
        value = _plain(name, given)
        if name in only:
            if value not in (wanted := only[name] + also.get(name, ())):
                of_experts = "a mixture of experts with " * (name in ONLY_OF_EXPERTS)
                raise ConfigError(
                    f"{of_experts}{name} {given!r} is not supported, only {wanted[0]!r} is: "
                    f"{_WAY_OUT}"
                )
        elif name in ("spec", "transformer_layer_spec", "hybrid_stack_spec"):
            _check_spec(name, given)
        elif name == "moe_router_load_balancing_type" and has_experts:
            if other := set([given] if isinstance(given, str) else given or ()) - _BALANCINGS:
                raise ConfigError(
                    f"a mixture of experts with {name} {min(other)!r} is not supported: it may "
                    "weigh the experts otherwise"
                )
        elif _is_unknown(name) and value not in (None, False, "", (), {}):
            if all_are_the_models or _WORDS.search(name):
                raise ConfigError(
                    f"{name} {given!r} is not known, and may change what the model computes: "
                    f"remove it if it does not, else {_WAY_OUT}"
                )


def _is_unknown(name: str) -> bool:
    known = READ | HARMLESS | ONLY_OF_EXPERTS.keys()
    return name not in known and not _HARMLESS.match(name)


def _plain(name: str, value: Any) -> Any:
    """Lists as tuples; a frequency of layers that says the same of each as one number."""
    if not isinstance(value, list | tuple):
        return value
    same = name.endswith("_freq") and len(set(value)) == 1
    return value[0] if same else tuple(value)


def _check_spec(name: str, value: Any) -> None:
    """Layers of Megatron's own follow its settings; those of another module may do anything."""
    target = value.get("_target_") if isinstance(value, dict) else value
    target = target[0] if isinstance(target, list | tuple) and target else target
    if target and not str(target).startswith("megatron."):
        raise ConfigError(
            f"{name} {target!r} is not one of Megatron's own, and may change what the model "
            f"computes: {_WAY_OUT}"
        )
