"""Mixtral (arXiv 2401.04088): Mistral's attention and a mixture of SwiGLU experts.

A token's weights for its experts are the softmax over their router logits alone.
"""

from pose_megatron.models.families import llama
from pose_megatron.models.families.experts import stacked, with_experts
from pose_megatron.models.families.family import SIZES, Family

_MOE = f"{llama.HF_LAYER}.block_sparse_moe"
_TENSORS = with_experts(
    llama.TENSORS, f"{_MOE}.gate.weight", f"{_MOE}.experts.{{}}", gate="w1", up="w3", down="w2"
)

MIXTRAL = Family(
    name="mixtral",
    title="Mixtral",
    tensors=_TENSORS,
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    sizes=SIZES
    | {
        "intermediate_size": "moe_ffn_hidden_size",
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "moe_router_topk",
    },
    only={"hidden_act": "silu", "sliding_window": None, "router_jitter_noise": 0.0},
    defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    carried=("router_aux_loss_coef", "output_router_logits"),
    epsilon=("rms_norm_eps", 1e-5),
    stacked=stacked(_TENSORS, f"{llama.HF_LAYER}.mlp"),
)
