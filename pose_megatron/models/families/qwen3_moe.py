"""Qwen3-MoE (arXiv 2505.09388): Qwen3's attention and, in every layer, a mixture of SwiGLU experts.

A token's weights for its experts are their share of the softmax over all of them; `norm_topk_prob`
makes these add up to one, which is the softmax over the chosen experts. There are no shared
experts.
"""

from pose_megatron.models.families import llama
from pose_megatron.models.families.experts import stacked, with_experts
from pose_megatron.models.families.family import SIZES, Family
from pose_megatron.models.families.qwen3 import QWEN3

_MLP = f"{llama.HF_LAYER}.mlp"
_TENSORS = with_experts(
    QWEN3.tensors,
    f"{_MLP}.gate.weight",
    f"{_MLP}.experts.{{}}",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    title="Qwen3-MoE",
    tensors=_TENSORS,
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    sizes=SIZES
    | {
        "num_experts": "num_experts",
        "num_experts_per_tok": "moe_router_topk",
        "moe_intermediate_size": "moe_ffn_hidden_size",
    },
    spellings={"num_local_experts": "num_experts"},  # transformers 5's
    normalizes_key="norm_topk_prob",
    only={
        "hidden_act": "silu",
        "use_sliding_window": False,
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    defaults={
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    carried=("router_aux_loss_coef", "output_router_logits"),
    stacked=stacked(_TENSORS, _MLP),
    qk_layernorm=True,
)
