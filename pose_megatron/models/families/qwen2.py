"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): LLaMA with biases on queries, keys, values."""

from pose_megatron.models.families import llama
from pose_megatron.models.families.family import Family, HFNames
from pose_megatron.models.tensors import LAYER

QKV_BIAS: dict[str, HFNames] = {
    f"{LAYER}.self_attention.linear_qkv.bias": tuple(
        f"{llama.HF_LAYER}.self_attn.{x}_proj.bias" for x in "qkv"
    )
}

QWEN2 = Family(
    name="qwen2",
    title="Qwen2",
    tensors=llama.TENSORS | QKV_BIAS,
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    only={"hidden_act": "silu", "use_sliding_window": False},
    defaults={"num_key_value_heads": 32},
    add_qkv_bias=True,
)
