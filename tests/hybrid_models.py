"""Stock megatron-core HybridModels, from 0.19 on, of its layers that need no Transformer Engine."""

import copy
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

HAS_HYBRID = Version(version("megatron-core")) >= Version("0.19")
needs_hybrid = pytest.mark.skipif(
    not HAS_HYBRID, reason="HybridModel's translation to GPTModel is in megatron-core 0.19"
)


def stock_hybrid(model, config, pattern, **options):
    """megatron-core's HybridModel of a ModelConfig; its final norm alone is replaced, as that is
    always Transformer Engine's. A layer `M` is a causal stand-in, as Mamba's kernels need a GPU.
    """
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    class Stack(HybridStack):
        def __init__(self, config, submodules, **kwargs):
            super().__init__(config, submodules, **kwargs | {"post_layer_norm": False})
            self.post_layer_norm = True
            if self.post_process:
                self.final_norm = WrappedTorchNorm(
                    config, config.hidden_size, config.layernorm_epsilon
                )

    class RunningMean(torch.nn.Module):
        def __init__(self, config, layer_number, **_):
            super().__init__()
            self.layer_number = layer_number

        def forward(self, hidden_states, **_):
            tokens = torch.arange(1, 1 + hidden_states.size(0)).view(-1, 1, 1)
            return hidden_states + hidden_states.cumsum(0) / tokens

    local = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    spec = ModuleSpec(
        module=Stack,
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(module=RunningMean),
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=local.input_layernorm,
                    self_attention=local.self_attention,
                    self_attn_bda=get_bias_dropout_add,
                    sharded_state_dict_keys_map={
                        "input_layernorm.": "self_attention.linear_qkv.layer_norm_"
                    },
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=local.pre_mlp_layernorm,
                    mlp=local.mlp,
                    mlp_bda=get_bias_dropout_add,
                    sharded_state_dict_keys_map={
                        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"
                    },
                ),
            ),
        ),
    )
    config = copy.deepcopy(config)
    config.num_layers = len(pattern.split("/")[0])
    settings = {
        "vocab_size": model.padded_vocab_size,
        "max_sequence_length": model.max_position_embeddings,
        "hybrid_layer_pattern": pattern,
        "share_embeddings_and_output_weights": not model.untie_embeddings_and_output_weights,
        "position_embedding_type": "rope",
        "rotary_percent": model.rotary_percent,
        "rotary_base": model.rotary_base,
    }
    return HybridModel(config, spec, **settings | options)


def hybrid_name(name: str) -> str:
    """A GPTModel's parameter name -> a HybridModel's of pattern `*-*-...`."""
    parts = name.replace("decoder.final_layernorm", "decoder.final_norm").split(".")
    if parts[1] == "layers":
        parts[2] = str(2 * int(parts[2]) + (parts[3] in ("pre_mlp_layernorm", "mlp")))
    return ".".join(parts)
