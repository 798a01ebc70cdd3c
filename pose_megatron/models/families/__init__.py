"""The families of models, one file each; a new one is its file and its place in FAMILIES."""

import dataclasses

from pose_megatron.errors import ConfigError
from pose_megatron.models.families.baichuan import BAICHUAN
from pose_megatron.models.families.family import Family
from pose_megatron.models.families.gptj import GPTJ
from pose_megatron.models.families.llama import LLAMA
from pose_megatron.models.families.mistral import MISTRAL
from pose_megatron.models.families.mixtral import MIXTRAL
from pose_megatron.models.families.qwen2 import QWEN2
from pose_megatron.models.families.qwen3 import QWEN3
from pose_megatron.models.families.qwen3_moe import QWEN3_MOE

# By name; where the layers of several are the same, flags of a fresh model mean the first.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE, BAICHUAN, GPTJ)
}
_GEMMA3 = (
    "its layers rotate by two bases, one within a sliding window, and have norms behind attention "
    "and MLP, for which megatron-core's layers have no place"
)
# Families that one might expect, by config.json's model_type: why they cannot be.
REFUSED = {"gemma3": _GEMMA3, "gemma3_text": _GEMMA3}
# Megatron's flags can also ask for Qwen2's biases and Qwen3's norms in one model.
_BIASES_AND_NORMS = dataclasses.replace(
    QWEN3,
    name="",
    title="",
    tensors={**QWEN2.tensors, **QWEN3.tensors},
    architecture="",
    model_type="",
    add_qkv_bias=True,
    in_transformers=False,
)


def family_named(name: str | None) -> Family:
    """The family of a ModelConfig; None stands for the one that Hugging Face does not have.

    Raises:
        ConfigError: there is no family of this name.
    """
    if name is None:
        return _BIASES_AND_NORMS
    if name not in FAMILIES:
        raise ConfigError(
            f"the family {name!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def family_of(add_qkv_bias: bool, qk_layernorm: bool, has_experts: bool = False) -> str | None:
    """The name of the first family with these settings, None where Hugging Face has none.

    Raises:
        ConfigError: there is no mixture of experts with biases.
    """
    wanted = (add_qkv_bias, qk_layernorm, has_experts)
    for name, family in FAMILIES.items():
        if (family.add_qkv_bias, family.qk_layernorm, family.has_experts) == wanted:
            return name
    if has_experts:
        raise ConfigError("--add-qkv-bias: no supported mixture of experts has these biases")
    return None


def family_as_llama(name: str | None) -> str:
    """LLaMA's name, for a family that --as-llama can export.

    Raises:
        ConfigError: the family cannot be exported as a LLaMA.
    """
    if not family_named(name).exports_as_llama:
        titles = ", ".join(family.title for family in FAMILIES.values() if family.exports_as_llama)
        raise ConfigError(f"--as-llama is for {titles}, not {name}")
    return LLAMA.name
