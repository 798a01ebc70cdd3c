"""What a family of models is: everything that LLaMA, Qwen or GPT-J does in its own way.

A family is one `Family`, in a file of its own beside this one, and its line in FAMILIES
(`families/__init__.py`). The defaults are LLaMA's. Family files import neither megatron-core nor
transformers, as the converter must start fast; methods that need them import them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pose_megatron.models.tensors import ROUTER, TensorShape, tensor_shapes

if TYPE_CHECKING:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

# A Hugging Face name, or the names of the tensors that Megatron keeps in one, in its order.
HFNames = str | tuple[str, ...]

SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models.

    Attributes:
        name: its name in ModelConfig and in checkpoints.
        title: its name in messages.
        tensors: name table, Megatron's name (models/tensors.py) -> Hugging Face's.

        architecture, model_type: how config.json names it.
        sizes: config.json's name -> ModelConfig's.
        spellings: another name in config.json -> the one in `sizes`.
        normalizes_key: config.json's name of whether the weights of the chosen experts are made
            to add up to one; None where they always are.
        carried: config.json's keys that say nothing about the layers and are handed on to an
            export.
        stacked: a tensor in the layout that transformers 5 has in memory, and also writes with
            save_original_format=False -> the names in `tensors` that it stands for; with several,
            or with the number of an expert, it holds an expert along its first axis, and their
            rows one after another.
        only: config.json's keys of which our layers compute one value alone; an absent key has it.
        defaults: values that transformers takes for absent keys, where they are not `only`'s.
        epsilon: config.json's name of the norms' epsilon, and its default.
        rotary_dim_key: config.json's name of the number of channels of a head that rotate; None
            where whole heads rotate.
        reads_rope: whether the code of the family reads rope keys from config.json; without them
            the base is 10000 and nothing is interpolated.
        in_transformers: whether transformers has a class for it.
        in_megatron_lm: whether stock Megatron-LM computes it.
        in_meta_format: whether Meta's consolidated.NN.pth can hold it.
        exports_as_llama: whether `weight_as_llama` turns it into a LLaMA.

        add_qkv_bias, qk_layernorm, normalization, add_bias_linear, rotary_interleaved:
            megatron-core's settings.
        gated_mlp, activation: fc2(activation(gate) * up), or fc2(activation(fc1)) without a gate.
    """

    name: str
    title: str
    tensors: Mapping[str, HFNames]

    architecture: str
    model_type: str
    sizes: Mapping[str, str] = field(default_factory=lambda: SIZES)
    spellings: Mapping[str, str] = field(default_factory=dict)
    normalizes_key: str | None = None
    carried: tuple[str, ...] = ()
    stacked: Mapping[str, HFNames] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    epsilon: tuple[str, float] = ("rms_norm_eps", 1e-6)
    rotary_dim_key: str | None = None
    reads_rope: bool = True
    in_transformers: bool = True
    in_megatron_lm: bool = True
    in_meta_format: bool = False
    exports_as_llama: bool = False

    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    normalization: str = "RMSNorm"
    gated_mlp: bool = True
    activation: Callable[[Tensor], Tensor] = F.silu
    add_bias_linear: bool = False
    rotary_interleaved: bool = False

    # Weights

    @property
    def has_experts(self) -> bool:
        """Whether every layer's MLP is a mixture of experts."""
        return ROUTER in self.tensors

    def tensor_shapes(self, **sizes: Any) -> dict[str, TensorShape]:
        """Megatron's shapes of the tensors; sizes as in models.tensors.tensor_shapes.

        Parameter count and FLOPs of a model are taken from these."""
        return tensor_shapes(self.tensors, gated_mlp=self.gated_mlp, **sizes)

    def weight_as_llama(self, name: str, tensor: Tensor) -> None:
        """Changes a Megatron tensor, in place, into that of the LLaMA with the same logits."""

    # Hugging Face

    def default_sizes(self, hidden_size: int, num_attention_heads: int) -> dict[str, int]:
        """ModelConfig's sizes where config.json does not say them."""
        return {
            "num_query_groups": num_attention_heads,
            "kv_channels": hidden_size // max(num_attention_heads, 1),
        }

    def transformers_rope(self, config: Any, length: int) -> tuple[Tensor, float]:
        """What transformers rotates by: the functions that its rotary module calls, because
        importing the module itself takes seconds.

        Args:
            config: transformers' config of the family.
            length: of the sequence, in tokens.

        Returns:
            Inverse frequencies [rotary_dim / 2] in radians per position, and the attention factor
            that multiplies cos and sin.
        """
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope = config.rope_parameters
        if rope["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=length)
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2).float() / width), 1.0

    # Megatron

    def transformer_settings(self) -> dict[str, Any]:
        """Arguments of megatron-core's TransformerConfig, beside the model's sizes."""
        return {
            "normalization": self.normalization,
            "gated_linear_unit": self.gated_mlp,
            "activation_func": self.activation,
            "add_bias_linear": self.add_bias_linear,
            "rotary_interleaved": self.rotary_interleaved,
        }

    def megatron_args(self) -> dict[str, Any]:
        """The same settings as arguments of Megatron-LM."""
        return {
            "normalization": self.normalization,
            "swiglu": self.gated_mlp and self.activation is F.silu,
            "add_bias_linear": self.add_bias_linear,
            "rotary_interleaved": self.rotary_interleaved,
        }

    def layer_spec(
        self, config: "TransformerConfig", implementation: str, vp_stage: int | None = None
    ) -> "TransformerBlockSubmodules":
        """This pipeline stage's layers; arguments and errors as in models.attention.layer_spec."""
        from pose_megatron.models.attention import layer_spec

        return layer_spec(config, implementation, vp_stage)

    def adapt_output_layer(self, layer: "ColumnParallelLinear") -> None:
        """Changes this rank's rows of a built output layer, in place."""
