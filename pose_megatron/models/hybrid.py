"""HybridModel with the layers of a GPTModel: attention `*` and MLP `-`, each a layer of its own.

Same weights, same losses, and the same checkpoints: its sharded state has GPTModel's names, by
megatron-core's own translation, so that either resumes what the other has saved. Needs
megatron-core 0.19, which has that translation; GPTModel is deprecated there.
"""

import copy

from megatron.core.dist_checkpointing.gpt_checkpoint_interop import (
    gpt_compatible_layer_maps,
    retarget_sharded_state_dict_to_gpt_checkpoint,
)
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from pose_megatron.errors import ConfigError
from pose_megatron.models import fused_cross_entropy as cross_entropy
from pose_megatron.models.attention import RMSNorm, layer_spec, torch_layer_spec
from pose_megatron.models.gpt import PositionIdsDrivenHybrid
from pose_megatron.models.rotary import bind_rotary
from pose_megatron.rope.scaling import RopeScaling


class PoseHybridModel(PositionIdsDrivenHybrid):
    """A HybridModel whose rotary positions are its `position_ids`, and whose sharded state is a
    GPTModel's.

    Args:
        config: as PoseGPTModel's, with two layers for each of a GPTModel.
        rope_scaling, fused_rotary, fused_cross_entropy: as PoseGPTModel's.
        others: HybridModel's; the pattern has as many `*` as `-`.

    Raises:
        ConfigError: as PoseGPTModel.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args,
        rope_scaling: RopeScaling = RopeScaling(),
        rotary_base: float = 10000,
        rotary_percent: float = 1.0,
        fused_rotary: str = "auto",
        fused_cross_entropy: str = "auto",
        **kwargs,
    ):
        super().__init__(
            config,
            *args,
            **kwargs | {"position_embedding_type": "rope"},
            rotary_base=rotary_base,
            rotary_percent=rotary_percent,
        )
        self.rotary_base, self.rotary_percent = rotary_base, rotary_percent
        bind_rotary(self, rope_scaling, rotary_base, rotary_percent, fused_rotary)
        self.loss_by_kernel = cross_entropy.kernel_computes(fused_cross_entropy, self)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        sharded.pop(f"{prefix}output_layer._extra_state", None)  # which a GPTModel leaves out, too
        maps = gpt_compatible_layer_maps(self.hybrid_layer_pattern)
        retarget_sharded_state_dict_to_gpt_checkpoint(sharded, maps)
        return sharded


class TorchHybridStack(HybridStack):
    """A HybridStack without Transformer Engine, whose norm megatron-core's own always ends with.

    Args:
        final_norm: the class of the norm after the last layer.
        others: HybridStack's.

    Raises:
        ConfigError: the pattern has a layer that `submodules` lack; megatron-core would leave such
            a layer out, silently.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *args,
        final_norm: type,
        layer_type_list: list[str],
        post_layer_norm: bool = True,
        **kwargs,
    ):
        if others := sorted(set(layer_type_list) - set("*-")):
            raise ConfigError(
                f"hybrid layer {others[0]!r} has no implementation without Transformer Engine: "
                "--transformer-impl torch has attention '*' and MLP '-'"
            )
        super().__init__(
            config,
            submodules,
            *args,
            layer_type_list=layer_type_list,
            post_layer_norm=False,
            **kwargs,
        )
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = final_norm(config, config.hidden_size, config.layernorm_epsilon)


def hybrid_stack_spec(
    config: TransformerConfig,
    implementation: str = "torch",
    block: TransformerBlockSubmodules | None = None,
) -> ModuleSpec:
    """The layers of a HybridModel.

    Args:
        implementation: `torch` (attention and dense MLP), or `transformer_engine`, which is
            megatron-core's own stack with all kinds of layers.
        block: layers of a GPTModel to split for `torch`; by default LLaMA's.

    Raises:
        ConfigError: Transformer Engine cannot be imported, or the layer cannot be split.
    """
    if implementation == "transformer_engine":
        layer_spec(config, implementation)  # raises where it is missing
        return _transformer_engine_stack(config)
    layer = block.layer_specs[0] if block else torch_layer_spec(config)
    if layer.module is not TransformerLayer:
        raise ConfigError(
            "a HybridModel has attention and MLP in layers of their own, which "
            f"{layer.module.__name__} cannot be split into; use --model-class gpt"
        )
    if config.num_moe_experts is not None:
        raise ConfigError(
            f"a HybridModel has no experts (--num-experts {config.num_moe_experts}) with "
            "--transformer-impl torch; use --model-class gpt"
        )
    whole = layer.submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=whole.input_layernorm,
        self_attention=whole.self_attention,
        self_attn_bda=whole.self_attn_bda,
        sharded_state_dict_keys_map=whole.sharded_state_dict_keys_map,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=whole.pre_mlp_layernorm,
        mlp=whole.mlp,
        mlp_bda=whole.mlp_bda,
        sharded_state_dict_keys_map=whole.sharded_state_dict_keys_map,
    )
    return ModuleSpec(
        module=TorchHybridStack,
        params={"final_norm": block.layer_norm if block else RMSNorm},
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )


def _transformer_engine_stack(config: TransformerConfig) -> ModuleSpec:
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    if not config.qk_layernorm:
        return hybrid_stack_spec
    # The library hands out one shared object: change a copy.
    spec = copy.deepcopy(hybrid_stack_spec)
    attention = spec.submodules.attention_layer.submodules.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = TENorm
    return spec


def layer_pattern(config: TransformerConfig) -> str:
    """The layers of a GPTModel, in the order of pipeline stages and model chunks: `*-*-|*-*-`, or
    `*E*E|*E*E` with experts."""
    layer = "*-" if config.num_moe_experts is None else "*E"
    stages = config.pipeline_model_parallel_size
    chunks = stages * (config.virtual_pipeline_model_parallel_size or 1)
    return "|".join([layer * (config.num_layers // 2 // chunks)] * chunks)
