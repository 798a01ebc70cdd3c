"""LLaMA 1 to 3 (arXiv 2302.13971, 2307.09288, 2407.21783): the family that the others vary.

Pre-norm RMSNorm, attention without biases and with grouped queries, SwiGLU.
"""

from pose_megatron.models.families.family import Family, HFNames
from pose_megatron.models.tensors import EMBEDDING, LAYER, OUTPUT

HF_LAYER = "model.layers.{}"
TENSORS: dict[str, HFNames] = {
    EMBEDDING: "model.embed_tokens.weight",
    f"{LAYER}.self_attention.linear_qkv.layer_norm_weight": f"{HF_LAYER}.input_layernorm.weight",
    f"{LAYER}.self_attention.linear_qkv.weight": tuple(
        f"{HF_LAYER}.self_attn.{x}_proj.weight" for x in "qkv"
    ),
    f"{LAYER}.self_attention.linear_proj.weight": f"{HF_LAYER}.self_attn.o_proj.weight",
    f"{LAYER}.mlp.linear_fc1.layer_norm_weight": f"{HF_LAYER}.post_attention_layernorm.weight",
    f"{LAYER}.mlp.linear_fc1.weight": tuple(
        f"{HF_LAYER}.mlp.{x}_proj.weight" for x in ("gate", "up")
    ),
    f"{LAYER}.mlp.linear_fc2.weight": f"{HF_LAYER}.mlp.down_proj.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    OUTPUT: "lm_head.weight",
}

LLAMA = Family(
    name="llama",
    title="LLaMA",
    tensors=TENSORS,
    architecture="LlamaForCausalLM",
    model_type="llama",
    only={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    in_meta_format=True,
)
