"""GPT-J's layer, attention and MLP side by side on one LayerNorm, and its output layer's bias.

    y = LayerNorm(x);  x + Attention(y) + MLP(y)

The attention has no biases, the MLP has. Both projections into the residual stream are reduced over
the tensor ranks as in any other layer. Runs with `--transformer-impl torch` only.
"""

import dataclasses

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from pose_megatron.errors import ConfigError
from pose_megatron.models.attention import SdpaCoreAttention, mark_for_sequence_parallel


class LayerNorm(torch.nn.Module):
    """(x - mean) / std * weight + bias over the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.eps = eps
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, **options))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, **options))
        for parameter in (self.weight, self.bias):
            mark_for_sequence_parallel(parameter, config)

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class AttentionWithoutBias(SelfAttention):
    """Attention without biases in a layer whose MLP has them: megatron-core's add_bias_linear
    switches both."""

    def __init__(self, config: TransformerConfig, *args, **kwargs):
        super().__init__(dataclasses.replace(config, add_bias_linear=False), *args, **kwargs)


class ParallelLayer(TransformerLayer):
    """x + Attention(LayerNorm(x)) + MLP(LayerNorm(x)), [s, b, h] -> [s, b, h]."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        context=None,
        rotary_pos_emb=None,
        attention_bias=None,
        packed_seq_params=None,
        **_,
    ):
        normed = self.input_layernorm(hidden_states)
        attention, _ = self.self_attention(
            normed,
            attention_mask=attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
        )
        mlp, bias = self.mlp(normed)
        return hidden_states + attention + (mlp + bias), context


def layer_spec(
    config: TransformerConfig, implementation: str, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage; arguments as in models.attention.layer_spec.

    Raises:
        ConfigError: the implementation is Transformer Engine, which has no such layer.
    """
    if implementation != "torch":
        raise ConfigError(
            f"--transformer-impl {implementation} has no layer like GPT-J's; use "
            "--transformer-impl torch"
        )
    spec = get_gpt_layer_local_spec(normalization="LayerNorm")
    attention = dataclasses.replace(
        spec.submodules.self_attention,
        module=AttentionWithoutBias,
        submodules=dataclasses.replace(
            spec.submodules.self_attention.submodules, core_attention=SdpaCoreAttention
        ),
    )
    submodules = dataclasses.replace(
        spec.submodules,
        input_layernorm=LayerNorm,
        pre_mlp_layernorm=IdentityOp,
        self_attention=attention,
        sharded_state_dict_keys_map={},
    )
    layer = dataclasses.replace(spec, module=ParallelLayer, submodules=submodules)
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=LayerNorm)


def add_bias(layer: ColumnParallelLinear) -> None:
    """Gives an output layer a bias of zeros, one value for each of this rank's rows."""
    layer.bias = torch.nn.Parameter(layer.weight.new_zeros(layer.output_size_per_partition))
    set_tensor_model_parallel_attributes(layer.bias, True, 0, 1)
    layer.bias.allreduce = True  # over the data-parallel ranks, as megatron-core marks the weight
