"""megatron-core's GPTModel and HybridModel, driven by position ids.

megatron-core's own rotary embedding takes a length and rotates by 0, 1, 2, ...; `position_ids`
reach only the (absent) learned embedding. Here every pipeline stage turns its position ids into one
tensor of angles per micro-batch, [s, b, 1, rotary_dim] in float32, and hands it to the stock layers
in place of the stock tensor; for the kernel of `fused_rotary` it is a tensor of whole numbers.
Nothing reads "the current position ids" later: recomputation and interleaved schedules see the
tensor that their own forward made.
"""

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from pose_megatron.errors import ConfigError
from pose_megatron.models import fused_cross_entropy as cross_entropy
from pose_megatron.models.fused_cross_entropy import LossByKernel
from pose_megatron.models.rotary import (
    PoseRotaryEmbedding,
    bind_rotary,
    check_settings,
    softmax_scale,
)
from pose_megatron.rope.scaling import RopeScaling

try:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
except ImportError:  # its name before megatron-core 0.18
    from megatron.core.models.mamba.mamba_model import MambaModel as HybridModel

__all__ = ["PoseGPTModel", "PoseModel", "PoseRotaryEmbedding", "install_pose", "softmax_scale"]


class PositionIdsDriven(LossByKernel, GPTModel):
    """A GPTModel with a PoseRotaryEmbedding, which forward()'s `position_ids` drive."""

    def _preprocess(self, input_ids, position_ids, *args, **kwargs):
        # forward() and megatron-core's overlapped 1F1B schedule both come through here.
        with self.rotary_pos_emb.bound(position_ids):
            return super()._preprocess(input_ids, position_ids, *args, **kwargs)


class PositionIdsDrivenHybrid(LossByKernel, HybridModel):
    """A HybridModel with a PoseRotaryEmbedding, which forward()'s `position_ids` drive."""

    def forward(self, input_ids, position_ids, *args, **kwargs):
        # Angles travel to the layers as a tensor: recomputation finds them unbound but there.
        with self.rotary_pos_emb.bound(position_ids):
            return super().forward(input_ids, position_ids, *args, **kwargs)


PoseModel = PositionIdsDriven | PositionIdsDrivenHybrid


class PoseGPTModel(PositionIdsDriven):
    """A GPTModel whose rotary positions are its `position_ids`, [b, s] int64, on every stage.

    Args:
        config: megatron-core's; its `softmax_scale` is what `softmax_scale()` returns for
            `rope_scaling`.
        rope_scaling: interpolation of the rotary frequencies.
        fused_rotary: whether one kernel rotates queries and keys: `auto` (wherever there is a CUDA
            device and Triton), `on` or `off`.
        fused_cross_entropy: whether one kernel computes the loss where there are labels, in the
            same words; its backward pass overwrites the logits.
        others: GPTModel's.

    Raises:
        ConfigError: `config` lacks the attention temperature of `rope_scaling`, or has it twice;
            or it has a setting that rotates without the position ids; or a kernel cannot be `on`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args,
        rope_scaling: RopeScaling = RopeScaling(),
        fused_rotary: str = "auto",
        fused_cross_entropy: str = "auto",
        **kwargs,
    ):
        super().__init__(config, *args, **kwargs | {"position_embedding_type": "rope"})
        bind_rotary(self, rope_scaling, self.rotary_base, self.rotary_percent, fused_rotary)
        self.loss_by_kernel = cross_entropy.kernel_computes(fused_cross_entropy, self)


def install_pose(
    model: GPTModel | HybridModel,
    rope_scaling: RopeScaling = RopeScaling(),
    rotary_base: float | None = None,
    rotary_percent: float | None = None,
    fused_rotary: str = "auto",
    fused_cross_entropy: str = "auto",
) -> GPTModel | HybridModel:
    """Makes a model built by others follow its position ids, in place.

    Call it before DDP or Float16Module wraps the model, on every pipeline stage and model chunk.
    In a HybridModel the attention layers rotate, and all others stay as they are;
    `model.rotating_layers` then holds their numbers in the whole model, counted from 1. A second
    call with the same scaling changes nothing.

    Args:
        model: built with position_embedding_type="rope".
        rope_scaling: interpolation; replaces whatever the model was built with.
        rotary_base, rotary_percent: what the model was built with. A GPTModel knows them; a
            HybridModel does not, and needs both.
        fused_rotary, fused_cross_entropy: as PoseGPTModel's.

    Raises:
        ConfigError: the model is wrapped already, follows its position ids with another scaling,
            has no such rotary embedding, or layers that rotate without it; rotary_base or
            rotary_percent is missing or not the model's; its attention temperature is not the
            scaling's (build it with `config.softmax_scale = softmax_scale(...)`); or a kernel
            cannot be `on`.
    """
    _check_kind(model)
    base = _given(model, "rotary_base", rotary_base)
    percent = _given(model, "rotary_percent", rotary_percent)
    if isinstance(model.rotary_pos_emb, PoseRotaryEmbedding):
        if (installed := model.rotary_pos_emb.scaling) != rope_scaling:
            raise ConfigError(
                f"the model follows its position ids already, with rope scaling '{installed}'; "
                f"build it anew to install '{rope_scaling}'"
            )
        return model
    if isinstance(model, HybridModel):
        _check_frequencies(model.rotary_pos_emb, base, int(model.config.kv_channels * percent))
    loss_by_kernel = cross_entropy.kernel_computes(fused_cross_entropy, model)
    bind_rotary(model, rope_scaling, base, percent, fused_rotary)
    driven = PositionIdsDriven if isinstance(model, GPTModel) else PositionIdsDrivenHybrid
    cls = type(model)
    # A HybridModel keeps neither.
    model.rotary_base, model.rotary_percent = base, percent
    model.__class__ = type(f"Pose{cls.__name__}", (driven, cls), {})
    model.loss_by_kernel = loss_by_kernel
    return model


def _check_kind(model) -> None:
    name = type(model).__name__
    if not isinstance(model, GPTModel | HybridModel) and hasattr(model, "module"):
        raise ConfigError(
            f"install_pose got a model that {name} wraps already: call it on the model itself, "
            "before DDP or Float16Module wraps it"
        )
    kind = getattr(model, "position_embedding_type", None)
    if not isinstance(model, GPTModel | HybridModel) or kind != "rope":
        raise ConfigError(
            f"install_pose needs a GPTModel or HybridModel with position_embedding_type='rope', "
            f"not {name} with {kind!r}"
        )
    check_settings(model.config)


def _given(model: GPTModel | HybridModel, name: str, value: float | None) -> float:
    """What the model was built with, as it knows or as the caller says."""
    built: float | None = getattr(model, name, None)
    known = value if built is None else built
    if known is None:
        raise ConfigError(
            f"a {type(model).__name__} does not keep its {name}: hand install_pose the {name} "
            "that it was built with"
        )
    if value not in (None, known):
        raise ConfigError(f"{name} {value} is not the model's, which was built with {known}")
    return known


def _check_frequencies(stock: RotaryEmbedding, rotary_base: float, rotary_dim: int) -> None:
    """That base and width are those of the rotary embedding that the model was built with.

    They cannot be taken from it: its float32 frequencies give the base to six digits only.
    """
    given = 1.0 / rotary_base ** (torch.arange(0, rotary_dim, 2).double() / rotary_dim)
    built = stock.inv_freq.double().cpu()
    if built.shape != given.shape:
        raise ConfigError(
            f"rotary_percent gives {rotary_dim} rotary dimensions, the model was built with "
            f"{2 * built.numel()}"
        )
    if not torch.allclose(built, given, rtol=1e-5, atol=0):
        raise ConfigError(
            f"rotary_base {rotary_base} does not give the frequencies that the model was built with"
        )
