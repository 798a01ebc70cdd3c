"""Attention and RMSNorm without CUDA or Transformer Engine, and the layer spec of LLaMA.

`--transformer-impl torch` runs everywhere: core attention is torch's scaled_dot_product_attention
(cuDNN's kernels or flash attention where the device has them), also under context parallelism, and
RMSNorm supports sequence parallelism. Parameter names are Transformer Engine's, so one checkpoint
serves both specs.

Shapes: s = this rank's tokens (sequence / cp), b = micro-batch, h = this rank's heads, g = this
rank's query groups (key-value heads), d = kv_channels.
"""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention.bias import causal_lower_right

from pose_megatron.errors import ConfigError
from pose_megatron.runtime import transformer_engine


class SdpaCoreAttention(MegatronModule):
    """Causal attention by token index, never by position id, through torch's fused kernels.

    Under context parallelism keys and values are gathered over the group. Rank r of n holds chunks
    r and 2n-1-r of the sequence (megatron-core's zigzag), so every rank does the same work.
    """

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        *,
        softmax_scale=None,
        attention_dropout=None,
        pg_collection=None,
        **_,
    ):
        super().__init__(config=config)
        self.group = pg_collection.cp
        self.scale = softmax_scale if softmax_scale is not None else config.softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query,
        key,
        value,
        attention_mask=None,
        *,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
    ):
        """query [s, b, h, d], key and value [s, b, g, d] -> [s, b, h*d].

        Raises:
            ConfigError: packed (THD) sequences or a bias, which PoSE samples never have.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise ConfigError(
                "--transformer-impl torch has no packed (THD) sequences and no attention bias: "
                "PoSE samples are dense and causal"
            )
        query = query.permute(1, 2, 0, 3)
        key = self._whole(key).permute(1, 2, 0, 3)
        value = self._whole(value).permute(1, 2, 0, 3)
        if self.group.size() == 1:
            out = self._attend(query, key, value, is_causal=True)
        else:
            chunk = query.size(2) // 2
            halves = []
            for half, q in zip(self._chunks_here(), query.split(chunk, dim=2), strict=True):
                seen = (half + 1) * chunk
                # is_causal would align the mask at the top left; the last query sees all keys.
                mask = causal_lower_right(chunk, seen)
                halves.append(self._attend(q, key[:, :, :seen], value[:, :, :seen], mask))
            out = torch.cat(halves, dim=2)
        return out.permute(2, 0, 1, 3).flatten(2).contiguous()

    def _attend(self, query, key, value, mask=None, is_causal=False):
        dropout = self.dropout if self.training else 0.0
        options = {
            "attn_mask": mask,
            "is_causal": is_causal,
            "dropout_p": dropout,
            "scale": self.scale,
        }
        if not dropout or self.config.sequence_parallel:
            return attend(query, key, value, **options)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return attend(query, key, value, **options)

    def _chunks_here(self) -> tuple[int, int]:
        return self.group.rank(), 2 * self.group.size() - 1 - self.group.rank()

    def _whole(self, x):
        """This rank's [s, b, g, d] -> the whole sequence's [s * cp, b, g, d], in token order."""
        n = self.group.size()
        if n == 1:
            return x
        chunks = _Gather.apply(x, self.group).chunk(2 * n)
        order = [2 * min(c, 2 * n - 1 - c) + (c >= n) for c in range(2 * n)]
        return torch.cat([chunks[c] for c in order])


def attend(query, key, value, **options):
    """torch's attention: query [b, h, s, d], key and value [b, g, s, d] -> [b, h, s, d].

    For grouped queries in float32, GPUs have no kernel but the one that holds all scores: there
    keys and values are repeated, for the memory-efficient one.
    """
    if key.size(1) != query.size(1):
        if query.is_cuda and query.dtype == torch.float32:
            key, value = (for_each_head(x, query.size(1)) for x in (key, value))
        else:
            options["enable_gqa"] = True
    return F.scaled_dot_product_attention(query, key, value, **options)


def for_each_head(x, heads: int):
    """Keys or values of groups [b, g, s, d] -> of heads [b, h, s, d]."""
    return x.repeat_interleave(heads // x.size(1), dim=1)


class _Gather(torch.autograd.Function):
    """[s, ...] on each of n ranks -> [n*s, ...] in rank order; gradients are summed over ranks."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = x.new_empty(group.size() * x.size(0), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_empty(grad.size(0) // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        mark_for_sequence_parallel(self.weight, config)

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def mark_for_sequence_parallel(parameter: torch.nn.Parameter, config: TransformerConfig) -> None:
    """Has megatron-core sum the parameter's gradient over the tensor-parallel ranks, each of which
    sees a part of the sequence only."""
    # megatron-core finds the mark as an attribute, which Parameter does not declare.
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _mend_router() -> None:
    """Without Transformer Engine, the router of megatron-core 0.16.1 asks for a name that was never
    imported."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def layer_spec(
    config: TransformerConfig, implementation: str, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage.

    Args:
        implementation: `torch` or `transformer_engine`.
        vp_stage: model chunk of an interleaved pipeline's stage, else None.

    Raises:
        ConfigError: the implementation is Transformer Engine, which is missing, broken or of
            another version, or there is no GPU.
    """
    if implementation == "transformer_engine":
        if fault := transformer_engine.fault():
            raise ConfigError(
                f"--transformer-impl transformer_engine: {fault}. Or use --transformer-impl torch"
            )
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    # As a block: the final norm of a layer spec would be the library's, which refuses sequence
    # parallelism.
    return TransformerBlockSubmodules(
        layer_specs=[torch_layer_spec(config)] * layers, layer_norm=RMSNorm
    )


def torch_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One layer without Transformer Engine."""
    # The library hands out shared submodule objects: change a copy.
    spec = copy.deepcopy(
        get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm")
    )
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    if config.num_moe_experts:
        _mend_router()
        # Transformer Engine's layers take the norm into no linear layer, and so store it.
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
