"""GPT-J's layer: attention and MLP side by side on one LayerNorm.

    y = LayerNorm(x);  x + Attention(y) + MLP(y)

The attention has no biases, the MLP has. Both projections into the residual stream are reduced over
the tensor ranks as in any other layer. Runs with `--transformer-impl torch` only.
"""

import dataclasses

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from pose_megatron.errors import ConfigError
from pose_megatron.models.attention import SdpaCoreAttention


class LayerNorm(torch.nn.Module):
    """(x - mean) / std * weight + bias over the last dimension; both are marked as
    pose_megatron.models.attention.RMSNorm marks its weight."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.eps = eps
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, **options))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, **options))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class AttentionWithoutBias(SelfAttention):
    """megatron-core has one switch for the biases of a whole layer; the MLP's is on."""

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


def gptj_spec(
    config: TransformerConfig, implementation: str, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage; arguments as pose_megatron.models.attention.layer_spec.

    Raises:
        ConfigError: Transformer Engine was asked for, which has no such layer.
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
