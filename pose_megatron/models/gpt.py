"""megatron-core's GPTModel, driven by position ids.

megatron-core's own rotary embedding takes a length and rotates by 0, 1, 2, ...; `position_ids`
reach only the (absent) learned embedding. Here every pipeline stage turns its position ids into one
tensor of angles per micro-batch, [s, b, 1, rotary_dim] in float32, and hands it to the stock layers
in place of the stock tensor. Nothing reads "the current position ids" later: recomputation and
interleaved schedules see the tensor that their own forward made.
"""

import contextlib
import math

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from pose_megatron.errors import ConfigError
from pose_megatron.rope.angles import angles
from pose_megatron.rope.scaling import RopeScaling, attention_factor, inverse_frequencies


class PoseRotaryEmbedding(RotaryEmbedding):
    """Rotary angles at the position ids that it is bound to.

    Keeps inverse frequencies as a plain float64 tensor: a registered buffer would be cast to bf16
    with the model, which destroys positions beyond 256. `forward` is not cached: the stock cache is
    keyed by object identity and would return angles of a reused buffer's old content.
    """

    def __init__(
        self,
        kv_channels: int,
        rotary_percent: float,
        rotary_base: float,
        scaling: RopeScaling,
        cp_group,
        rotary_interleaved: bool = False,
    ):
        super().__init__(
            kv_channels,
            rotary_percent,
            rotary_interleaved,
            rotary_base=rotary_base,
            use_cpu_initialization=True,
            cp_group=cp_group,
        )
        self.scaling = scaling
        self._plain = (int(kv_channels * rotary_percent), rotary_base)
        trains = scaling.interpolation.trains
        self.set_length(None if trains else scaling.original_max_position_embeddings)
        self._position_ids = None

    def set_length(self, length: int | None) -> None:
        """Sets the frequencies for sequences of `length` tokens; None for those of training."""
        self.inv_freq = inverse_frequencies(*self._plain, self.scaling, length)

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

        Raises:
            ConfigError: nothing is bound, the length differs, or sequences are packed.
        """
        ids = self._position_ids
        if ids is None:
            raise ConfigError(
                "no position ids reached this pipeline stage: hand position_ids [b, s] to the "
                "model on every stage, the middle and last ones too"
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
        self.inv_freq = self.inv_freq.to(ids.device)
        both = angles(ids, self.inv_freq)  # (f, f)
        if self.rotary_interleaved:  # pairs of neighbouring channels, not of the two halves
            return both.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1)
        return both


class PositionIdsDriven(GPTModel):
    """A GPTModel with a PoseRotaryEmbedding, which forward()'s `position_ids` drive."""

    def _preprocess(self, input_ids, position_ids, *args, **kwargs):
        # forward() and megatron-core's overlapped 1F1B schedule both come through here.
        with self.rotary_pos_emb.bound(position_ids):
            return super()._preprocess(input_ids, position_ids, *args, **kwargs)


class PoseGPTModel(PositionIdsDriven):
    """A GPTModel whose rotary positions are its `position_ids`, [b, s] int64, on every stage.

    Args:
        config: megatron-core's; its `softmax_scale` is what `softmax_scale()` returns for
            `rope_scaling`.
        rope_scaling: interpolation of the rotary frequencies.
        others: GPTModel's.

    Raises:
        ConfigError: `config` lacks the attention temperature of `rope_scaling`, or has it twice;
            or it has a setting that rotates without the position ids.
    """

    def __init__(
        self, config: TransformerConfig, *args, rope_scaling: RopeScaling = RopeScaling(), **kwargs
    ):
        super().__init__(config, *args, **kwargs | {"position_embedding_type": "rope"})
        _bind_rotary(self, rope_scaling, kwargs.get("rotary_base", 10000))


def install_pose(model: GPTModel, rope_scaling: RopeScaling = RopeScaling()) -> GPTModel:
    """Makes a GPTModel built by others follow its position ids, in place.

    Call it before DDP or Float16Module wraps the model, on every pipeline stage and model chunk.

    Args:
        model: built with position_embedding_type="rope".
        rope_scaling: interpolation; replaces whatever the model was built with.

    Raises:
        ConfigError: the model has no such rotary embedding, or its attention temperature is not
            the scaling's (build it with `config.softmax_scale = softmax_scale(...)`).
    """
    if getattr(model, "position_embedding_type", None) != "rope":
        raise ConfigError(
            f"install_pose needs a GPTModel with position_embedding_type='rope', not "
            f"{type(model).__name__} with "
            f"{getattr(model, 'position_embedding_type', None)!r}"
        )
    _bind_rotary(model, rope_scaling, model.rotary_base)
    cls = type(model)
    if not isinstance(model, PositionIdsDriven):
        model.__class__ = type(f"Pose{cls.__name__}", (PositionIdsDriven, cls), {})
    return model


def _bind_rotary(model: GPTModel, scaling: RopeScaling, base: float) -> None:
    config = model.config
    if getattr(config, "mtp_num_layers", None):
        raise ConfigError(
            "mtp_num_layers: multi-token prediction shifts tokens but not angles; PoSE does not "
            "support it"
        )
    for fusion in ("apply_rope_fusion", "fused_single_qkv_rope"):
        if getattr(config, fusion, False):
            raise ConfigError(
                f"{fusion} expects one row of angles for the whole batch; switch it off"
            )
    # megatron-core 0.19 has renamed it; none of them is the whole layer.
    graphed = getattr(config, "cuda_graph_modules", None) or config.cuda_graph_scope or ["attn"]
    scope = {getattr(s, "name", s) for s in graphed}
    if config.cuda_graph_impl != "none" and scope & {"attn", "full", "full_iteration"}:
        raise ConfigError(
            f"cuda_graph_impl {config.cuda_graph_impl!r} over attention replays the angles of the "
            "samples it was captured with; set it to 'none', or cuda_graph_scope to 'mlp'"
        )
    wanted = softmax_scale(config.kv_channels, model.rotary_percent, scaling)
    if wanted != config.softmax_scale or hasattr(config, "yarn_rotary_scaling_factor"):
        raise ConfigError(
            f"rope scaling '{scaling.method}' needs config.softmax_scale = {wanted} (it is "
            f"{config.softmax_scale}) and no yarn_* attributes: the attention temperature takes "
            "exactly one route; set it from pose_megatron.models.gpt.softmax_scale before building"
        )
    model.rotary_pos_emb = PoseRotaryEmbedding(
        config.kv_channels,
        model.rotary_percent,
        base,
        scaling,
        model.rotary_pos_emb.cp_group,
        config.rotary_interleaved,
    )


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
