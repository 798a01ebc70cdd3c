"""Mistral (arXiv 2310.06825): LLaMA's layers. Its sliding window is not supported; v0.2 and later
have none."""

from pose_megatron.models.families import llama
from pose_megatron.models.families.family import Family

MISTRAL = Family(
    name="mistral",
    title="Mistral",
    tensors=llama.TENSORS,
    architecture="MistralForCausalLM",
    model_type="mistral",
    only={"hidden_act": "silu", "sliding_window": None},
    defaults={"sliding_window": 4096, "num_key_value_heads": 8},
)
