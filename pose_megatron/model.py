"""megatron-core's GPTModel, driven by position ids.

megatron-core's own rotary embedding takes a length and rotates by 0, 1, 2, ...; `position_ids`
reach only the (absent) learned embedding. Here every pipeline stage turns its position ids into one
tensor of angles per micro-batch, [s, b, 1, rotary_dim] in float32, and hands it to the stock layers
in the place of the stock tensor. Nothing reads "the current position ids" later: recomputation and
interleaved schedules see the tensor that their own forward made.
"""

import contextlib
import hashlib
import math

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from pose_megatron import checkpoint, distributed, head
from pose_megatron.arguments import defaults
from pose_megatron.attention import layer_spec
from pose_megatron.checkpoint import Checkpoint
from pose_megatron.distributed import device
from pose_megatron.flags import Arguments
from pose_megatron.gptj import gptj_spec
from pose_megatron.model_config import ModelConfig
from pose_megatron.rope import RopeScaling, angles, attention_factor, inverse_frequencies


class PoseRotaryEmbedding(RotaryEmbedding):
    """Angles at the position ids it is bound to.

    Keeps inverse frequencies as a plain float64 tensor: a registered buffer would be cast to bf16
    with the model, which destroys positions beyond 256. `forward` is not cached: the stock cache is
    keyed by object identity and would return angles of a reused buffer's old content.
    """

    def __init__(self, kv_channels: int, rotary_percent: float, rotary_base: float,
                 scaling: RopeScaling, cp_group, rotary_interleaved: bool = False):
        super().__init__(kv_channels, rotary_percent, rotary_interleaved, rotary_base=rotary_base,
                         use_cpu_initialization=True, cp_group=cp_group)
        self.scaling = scaling
        self._plain = (int(kv_channels * rotary_percent), rotary_base)
        self.fit(scaling.original_max_position_embeddings if scaling.method == "dynamic" else None)
        self._position_ids = None

    def fit(self, length: int | None) -> None:
        """Takes the frequencies for sequences of `length` tokens; None: those that train."""
        self.inv_freq = inverse_frequencies(*self._plain, self.scaling, length)

    @contextlib.contextmanager
    def bound(self, position_ids):
        """Within it, `forward` returns the angles at position_ids [b, s]."""
        self._position_ids = position_ids
        try:
            yield
        finally:
            self._position_ids = None

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group=None):
        """Angles [s, b, 1, rotary_dim] at the bound ids; s = max_seq_len / context ranks.

        Raises:
            ValueError: nothing is bound, the length differs, or sequences are packed.
        """
        ids = self._position_ids
        if ids is None:
            raise ValueError(
                "no position ids reached this pipeline stage: hand position_ids [b, s] to the "
                "model on every stage, the middle and last ones too"
            )
        if packed_seq:
            raise ValueError("PoSE has no packed (THD) sequences: feed dense rows [b, s]")
        here = max_seq_len // self.cp_group.size()
        if ids.dim() != 2 or ids.size(1) != here:
            raise ValueError(
                f"position ids have shape {tuple(ids.shape)}; this rank needs [b, {here}], sliced "
                "for context parallelism exactly once"
            )
        if self.training and self.scaling.method == "dynamic":
            self.fit(None)  # says why not
        self.inv_freq = self.inv_freq.to(ids.device)
        both = angles(ids, self.inv_freq)  # (f, f)
        if self.rotary_interleaved:  # neighbouring channels make a pair, not the two halves
            return both.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1)
        return both


class PositionIdsDriven:
    """Mixin for GPTModel: `position_ids` of forward() drive the rotary embedding."""

    def _preprocess(self, input_ids, position_ids, *args, **kwargs):
        # forward() and megatron-core's overlapped 1F1B schedule both come through here.
        with self.rotary_pos_emb.bound(position_ids):
            return super()._preprocess(input_ids, position_ids, *args, **kwargs)


class PoseGPTModel(PositionIdsDriven, GPTModel):
    """A GPTModel whose rotary positions are its `position_ids`, [b, s] int64, on every stage.

    Args:
        config: megatron-core's, with `softmax_scale` from `softmax_scale()` when the scaling has an
            attention factor.
        rope_scaling: interpolation of the rotary frequencies.
        others: GPTModel's.

    Raises:
        ValueError: the attention temperature of `rope_scaling` is not (or twice) in `config`.
    """

    def __init__(self, config: TransformerConfig, *args, rope_scaling: RopeScaling = RopeScaling(),
                 **kwargs):
        super().__init__(config, *args, **kwargs | {"position_embedding_type": "rope"})
        _bind_rotary(self, rope_scaling, kwargs.get("rotary_base", 10000))


def install_pose(model: GPTModel, rope_scaling: RopeScaling = RopeScaling()) -> GPTModel:
    """Makes a GPTModel that others built honour position ids, in place.

    Call it before DDP or Float16Module wraps the model, on every pipeline stage and model chunk.

    Args:
        model: built with position_embedding_type="rope".
        rope_scaling: interpolation; replaces whatever the model was built with.

    Raises:
        ValueError: the model has no rotary embedding of that type, or its attention temperature
            is not the scaling's (build it with `config.softmax_scale = softmax_scale(...)`).
    """
    if getattr(model, "position_embedding_type", None) != "rope":
        raise ValueError(
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
        raise ValueError(
            "mtp_num_layers: multi-token prediction shifts tokens but not angles; PoSE does not "
            "support it"
        )
    for fusion in ("apply_rope_fusion", "fused_single_qkv_rope"):
        if getattr(config, fusion, False):
            raise ValueError(
                f"{fusion} expects one row of angles for the whole batch; switch it off"
            )
    scope = {getattr(s, "name", s) for s in config.cuda_graph_scope or ["attn"]}
    if config.cuda_graph_impl != "none" and scope & {"attn", "full", "full_iteration"}:
        raise ValueError(
            f"cuda_graph_impl {config.cuda_graph_impl!r} over attention replays the angles of the "
            "samples it was captured with; set it to 'none', or cuda_graph_scope to 'mlp'"
        )
    wanted = softmax_scale(config.kv_channels, model.rotary_percent, scaling)
    if wanted != config.softmax_scale or hasattr(config, "yarn_rotary_scaling_factor"):
        raise ValueError(
            f"rope scaling '{scaling.method}' needs config.softmax_scale = {wanted} (it is "
            f"{config.softmax_scale}) and no yarn_* attributes: the attention temperature takes "
            "exactly one route; set it from pose_megatron.model.softmax_scale before building"
        )
    model.rotary_pos_emb = PoseRotaryEmbedding(
        config.kv_channels, model.rotary_percent, base, scaling, model.rotary_pos_emb.cp_group,
        config.rotary_interleaved)


def softmax_scale(kv_channels: int, rotary_percent: float, scaling: RopeScaling) -> float | None:
    """What multiplies q.k: attention_factor^2 / sqrt(d); None (1 / sqrt(d)) without a temperature.

    YaRN multiplies cos and sin by the factor, so every rotated product q.k by its square. Folding
    it into the scale is the same thing when all of a head rotates, and leaves the rotary kernel
    alone.

    Raises:
        ValueError: a temperature on a partly rotating head, where the two differ.
    """
    factor = attention_factor(scaling)
    if factor == 1.0:
        return None
    if rotary_percent != 1.0:
        raise ValueError(
            f"--rope-scaling {scaling.method} has a temperature, which needs --rotary-percent 1.0, "
            f"not {rotary_percent}; use linear or ntk"
        )
    return factor**2 / math.sqrt(kv_channels)


def transformer_config(model: ModelConfig, args: Arguments) -> TransformerConfig:
    """megatron-core's description of a model, of its layout and of its precision."""
    p, t = args.parallel, args.training
    dtype = torch.bfloat16 if t.bf16 else torch.float32
    interleaved = p.num_layers_per_virtual_pipeline_stage is not None
    fusions = args.model.transformer_impl == "transformer_engine"
    gptj = model.is_gptj
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.norm_epsilon,
        normalization="LayerNorm" if gptj else "RMSNorm",
        gated_linear_unit=not gptj,
        activation_func=_gelu_new if gptj else F.silu,
        add_bias_linear=gptj,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        rotary_interleaved=gptj,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        softmax_scale=softmax_scale(
            model.kv_channels, model.rotary_percent, model.rope_scaling
        ),
        tensor_model_parallel_size=p.tensor_model_parallel_size,
        pipeline_model_parallel_size=p.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline_size(model.num_layers),
        context_parallel_size=p.context_parallel_size,
        # Interleaved stages without overlapped sends give wrong numbers, silently.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        sequence_parallel=p.sequence_parallel and p.tensor_model_parallel_size > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=t.bf16,
        use_cpu_initialization=not torch.cuda.is_available(),
        recompute_granularity=t.recompute_granularity,
        recompute_method=t.recompute_method,
        recompute_num_layers=t.recompute_num_layers,
        recompute_modules=t.recompute_modules,
        # Sum over tokens, divided once by the tokens of the whole batch: the only form in which
        # every layout has the same gradient.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        bias_activation_fusion=fusions,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )


def build_model(
    config: TransformerConfig, model: ModelConfig, args: Arguments, vp_stage: int | None = None
) -> PoseGPTModel:
    """This rank's pipeline stage (chunk `vp_stage` of it, if interleaved), on its device. Its
    weights are `initialize`'s or a checkpoint's to set."""
    spec = gptj_spec if model.is_gptj else layer_spec
    stage = PoseGPTModel(
        config,
        spec(config, args.model.transformer_impl, vp_stage),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        vp_stage=vp_stage,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        rope_scaling=model.rope_scaling,
    )
    if stage.post_process and model.is_gptj:
        head.add_bias(stage.output_layer)
    if stage.post_process and model.family == "baichuan":
        head.normalize(stage.output_layer)
    return stage.to(device())


def _gelu_new(x):
    return F.gelu(x, approximate="tanh")


def logits_function(stage: PoseGPTModel, vocab_size: int):
    """`logits(tokens [b, s], last, position_ids [b, s]) -> float32 [b, last, vocab_size]`.

    Positions are plain when not given. Only the last ones pass the output layer, so memory stays
    small at long contexts. For an undivided model (one pipeline stage, one tensor rank). Where
    frequencies depend on the length, they are those of the largest position, as in transformers.
    """
    rotary = stage.rotary_pos_emb

    @torch.no_grad()
    def logits(tokens, last: int, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        if rotary.scaling.depends_on_length:
            rotary.fit(int(position_ids.max()) + 1)
        hook = stage.output_layer.register_forward_pre_hook(
            lambda _, args: (args[0][-last:], *args[1:])  # hidden states are [s, b, h]
        )
        try:
            return stage(tokens, position_ids, None)[..., :vocab_size].float()
        finally:
            hook.remove()

    return logits


def load_logits(
    found: Checkpoint, model: ModelConfig | None = None, bf16: bool = False,
    rounded_to: torch.dtype | None = None,
):
    """`logits_function` of a checkpoint's weights in one process, in float32 or bfloat16.

    Args:
        model: its shape and rope, where they differ from the checkpoint's own.
        rounded_to: gives the weights the values that they have in another precision.
    """
    model, args = model or found.model, defaults(bf16=bf16)
    if not parallel_state.model_parallel_is_initialized():
        distributed.initialize(args.parallel, args.training.seed)
    stage = build_model(transformer_config(model, args), model, args)
    checkpoint.load(found, [stage])
    if rounded_to is not None:
        round_to(rounded_to, stage)
    return logits_function(stage.eval(), model.vocab_size)


@torch.no_grad()
def round_to(dtype: torch.dtype, model: torch.nn.Module) -> None:
    """Gives weights the values that they have in another precision; their own stays."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


@torch.no_grad()
def initialize(stage: GPTModel, seed: int, std: float, num_layers: int) -> None:
    """Fresh weights that do not depend on the layout of ranks.

    Each weight is drawn whole from a generator keyed by (seed, name, layer) and every rank keeps
    its shard. Normal with `std`; projections into the residual stream with std / sqrt(2 * layers)
    (Radford et al., 2019), as Megatron-LM does; norms are one, biases zero.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharded = stage.sharded_state_dict(metadata={"dp_cp_group": group})
    found, _ = extract_sharded_tensors_and_factories(sharded)
    for entry in _flat(found):
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts:
            _fill(part, seed, std, num_layers)


def _flat(tree):
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _flat(value)
    else:
        yield tree


def _fill(part: ShardedTensor, seed: int, std: float, num_layers: int) -> None:
    if "norm" in part.key:
        return
    if part.key.endswith(".bias"):
        part.data.zero_()
        return
    axes = part.prepend_axis_num
    layer, offset = part.global_offset[:axes], part.global_offset[axes:]
    if part.key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * num_layers)
    name = f"{seed} {part.key} {layer}".encode()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(hashlib.blake2b(name, digest_size=7).digest()))
    whole = torch.empty(part.global_shape[axes:]).normal_(0, std, generator=generator)
    shard = tuple(slice(o, o + n) for o, n in zip(offset, part.local_shape, strict=True))
    part.data.copy_(whole[shard])
