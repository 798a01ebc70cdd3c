"""Rotary angles of a model at its position ids, and what of a model would rotate past them."""

import contextlib
import logging
import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import Attention, SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import log_single_rank

from pose_megatron.errors import ConfigError
from pose_megatron.models import fused_rotary
from pose_megatron.rope.angles import angles, fixed_point_turns
from pose_megatron.rope.scaling import RopeScaling, attention_factor, inverse_frequencies

logger = logging.getLogger(__name__)


class PoseRotaryEmbedding(RotaryEmbedding):
    """Rotary angles at the position ids that it is bound to.

    Keeps inverse frequencies as a plain float64 tensor: a registered buffer would be cast to bf16
    with the model, which destroys positions beyond 256. `forward` is not cached: the stock cache is
    keyed by object identity and would return angles of a reused buffer's old content.

    Args:
        fused: whether the layers take what fused_rotary.packed makes in the place of angles.
        others: RotaryEmbedding's.
    """

    def __init__(
        self,
        kv_channels: int,
        rotary_percent: float,
        rotary_base: float,
        scaling: RopeScaling,
        cp_group,
        rotary_interleaved: bool = False,
        fused: bool = False,
    ):
        super().__init__(
            kv_channels,
            rotary_percent,
            rotary_interleaved,
            rotary_base=rotary_base,
            use_cpu_initialization=True,
            cp_group=cp_group,
        )
        self.scaling, self.fused = scaling, fused
        self._plain = (int(kv_channels * rotary_percent), rotary_base)
        trains = scaling.interpolation.trains
        self.set_length(None if trains else scaling.original_max_position_embeddings)
        self._position_ids = None

    def set_length(self, length: int | None) -> None:
        """Sets the frequencies for sequences of `length` tokens; None for those of training."""
        self.inv_freq = inverse_frequencies(*self._plain, self.scaling, length)
        self._turns = fixed_point_turns(self.inv_freq)

    @contextlib.contextmanager
    def bound(self, position_ids):
        """A context in which `forward` returns the angles at position_ids [b, s]."""
        self._position_ids = position_ids
        try:
            yield
        finally:
            self._position_ids = None

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group=None):
        """Angles [s, b, 1, rotary_dim] at the bound ids; s = max_seq_len / context ranks.

        For the kernel, where it can take these ids, they and the frequencies instead.

        Raises:
            ConfigError: nothing is bound, the length differs, sequences are packed, or the ids have
                16 bits.
        """
        ids = self._position_ids
        if ids is None:
            raise ConfigError(
                "no position ids reached this pipeline stage: hand position_ids [b, s] to the "
                "model on every stage, the middle and last ones too"
            )
        if ids.dtype in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f"position ids have become {ids.dtype}, which cannot hold most whole numbers above "
                "256: Float16Module casts floating-point ones; hand them over as int64"
            )
        if packed_seq:
            raise ConfigError("PoSE has no packed (THD) sequences: feed dense rows [b, s]")
        here = max_seq_len // self.cp_group.size()
        if ids.dim() != 2 or ids.size(1) != here:
            raise ConfigError(
                f"position ids have shape {tuple(ids.shape)}; this rank needs [b, {here}], sliced "
                "for context parallelism exactly once"
            )
        if self.training and not self.scaling.interpolation.trains:
            self.set_length(None)  # raises: such a method has no frequencies to train with
        if self.fused and fused_rotary.takes(ids):
            self._turns = self._turns.to(ids.device)
            return fused_rotary.packed(ids, self._turns)
        self.inv_freq = self.inv_freq.to(ids.device)
        both = angles(ids, self.inv_freq)  # (f, f)
        if self.rotary_interleaved:  # pairs of neighbouring channels, not of the two halves
            return both.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1)
        return both


def softmax_scale(kv_channels: int, rotary_percent: float, scaling: RopeScaling) -> float | None:
    """The factor of q.k: attention_factor^2 / sqrt(d); None (1 / sqrt(d)) without a temperature.

    YaRN multiplies cos and sin by the attention factor, and so every rotated product q.k by its
    square. Where the whole head rotates, a larger softmax scale does the same and leaves the rotary
    kernel alone.

    Raises:
        ConfigError: the scaling has a temperature and only a part of the head rotates.
    """
    factor = attention_factor(scaling)
    if factor == 1.0:
        return None
    if rotary_percent != 1.0:
        raise ConfigError(
            f"--rope-scaling {scaling.method} has a temperature, which needs --rotary-percent 1.0, "
            f"not {rotary_percent}; use linear or ntk"
        )
    return factor**2 / math.sqrt(kv_channels)


def bind_rotary(
    model: Any,
    scaling: RopeScaling,
    rotary_base: float,
    rotary_percent: float,
    fused: str = "auto",
) -> None:
    """Gives a built GPTModel or HybridModel a PoseRotaryEmbedding in place of its own.

    Sets `model.rotating_layers`, the layers that follow the position ids, counted from 1.

    Args:
        fused: whether the kernel rotates: `auto`, `on` or `off`, as fused_rotary.kernel_rotates.

    Raises:
        ConfigError: the model has a setting that rotates without the position ids, or lacks the
            attention temperature of `scaling`, or no layer of it rotates, or the kernel cannot be
            `on`. It is left as it was.
    """
    config = model.config
    check_settings(config)
    rotating = _rotating_layers(model)
    wanted = softmax_scale(config.kv_channels, rotary_percent, scaling)
    if wanted != config.softmax_scale or hasattr(config, "yarn_rotary_scaling_factor"):
        raise ConfigError(
            f"rope scaling '{scaling.method}' needs config.softmax_scale = {wanted} (it is "
            f"{config.softmax_scale}) and no yarn_* attributes: the attention temperature takes "
            "exactly one route; set it from pose_megatron.models.gpt.softmax_scale before building"
        )
    layers = [layer for layer in model.decoder.layers if _rotates(layer, config)]
    attentions = [layer.self_attention for layer in layers]
    by_kernel = fused_rotary.kernel_rotates(fused, attentions)
    model.rotary_pos_emb = PoseRotaryEmbedding(
        config.kv_channels,
        rotary_percent,
        rotary_base,
        scaling,
        model.rotary_pos_emb.cp_group,
        config.rotary_interleaved,
        by_kernel,
    )
    if by_kernel:
        fused_rotary.rotate_by_kernel(attentions)
    model.rotating_layers = rotating


def check_settings(config: TransformerConfig) -> None:
    """That nothing rotates without the position ids.

    Raises:
        ConfigError: naming the setting.
    """
    if config.multi_latent_attention:
        raise ConfigError(
            "multi_latent_attention: MLA rotates by an embedding inside each layer, which no "
            "position ids reach; PoSE does not support it"
        )
    if getattr(config, "mtp_num_layers", None):
        raise ConfigError(
            "mtp_num_layers: multi-token prediction shifts tokens but not angles; PoSE does not "
            "support it"
        )
    for fusion in ("apply_rope_fusion", "fused_single_qkv_rope"):
        if getattr(config, fusion, False):
            raise ConfigError(
                f"{fusion} expects one row of angles for the whole batch; switch it off "
                "(--fused-rotary takes its place)"
            )
    # The other implementations give each micro-batch its own angles: `local` copies them into its
    # graphs' buffers before every replay, and a whole iteration's graph computes them.
    if config.cuda_graph_impl == "transformer_engine":
        # megatron-core 0.19 has renamed it; none of them is the whole layer.
        graphed = getattr(config, "cuda_graph_modules", None) or config.cuda_graph_scope
        if not graphed or {getattr(s, "name", s) for s in graphed} & {"attn", "full"}:
            raise ConfigError(
                "cuda_graph_impl 'transformer_engine' over attention asks the rotary embedding for "
                "sample angles at capture, where there are no position ids; set it to 'local' or "
                "'none', or cuda_graph_scope to 'mlp' (cuda_graph_modules from 0.19 on)"
            )


def _rotating_layers(model: Any) -> tuple[int, ...]:
    """The layers that rotate, counted from 1: of the whole model where its pattern tells them, else
    of this pipeline stage."""
    here = {layer.layer_number: _rotates(layer, model.config) for layer in model.decoder.layers}
    pattern = _hybrid_pattern(model)
    if pattern is None:
        return tuple(number for number, rotates in here.items() if rotates)
    layers = pattern.replace("|", "")
    rotating = tuple(n for n, kind in enumerate(layers, 1) if kind == "*" and here.get(n, True))
    if not rotating:
        raise ConfigError(
            f"hybrid layer pattern {pattern!r} has no attention layer ('*') whose positions PoSE "
            "could extend"
        )
    if len(rotating) < len(layers):
        numbers = ", ".join(map(str, rotating))
        message = f"of {len(layers)} layers, these rotate by their position ids: {numbers}"
        log_single_rank(logger, logging.INFO, message)
    return rotating


def _hybrid_pattern(model: Any) -> str | None:
    """The layers of a whole HybridModel, such as 'M-*-|M-*-'; None in a GPTModel."""
    names = ("hybrid_layer_pattern", "hybrid_override_pattern")
    found = (getattr(model, name, None) for name in names)
    pattern: str | None = next(filter(None, found), None)
    if pattern and "/" in pattern:
        raise ConfigError(
            f"hybrid layer pattern {pattern!r}: multi-token prediction, after the '/', shifts "
            "tokens but not angles; PoSE does not support it"
        )
    return pattern


def _rotates(layer: Any, config: TransformerConfig) -> bool:
    attention = getattr(layer, "self_attention", None)
    if isinstance(attention, Attention) and not isinstance(attention, SelfAttention):
        raise ConfigError(
            f"layer {layer.layer_number} has {type(attention).__name__}, which does not take its "
            "angles from the model's rotary embedding; PoSE supports SelfAttention"
        )
    unrotated = getattr(config, "no_rope_freq", None)
    if unrotated and unrotated[layer.layer_number - 1]:
        return False
    return isinstance(attention, SelfAttention)
