"""Qwen3 (arXiv 2505.09388): LLaMA with an RMSNorm over each head of queries and keys."""

from pose_megatron.models.families import llama
from pose_megatron.models.families.family import Family, HFNames
from pose_megatron.models.tensors import LAYER

QK_NORMS: dict[str, HFNames] = {
    f"{LAYER}.self_attention.{x}_layernorm.weight": f"{llama.HF_LAYER}.self_attn.{x}_norm.weight"
    for x in "qk"
}

QWEN3 = Family(
    name="qwen3",
    title="Qwen3",
    tensors=llama.TENSORS | QK_NORMS,
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    only={"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    qk_layernorm=True,
)
