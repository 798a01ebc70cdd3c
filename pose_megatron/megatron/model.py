"""PoSE in Megatron's configuration of a model: interpolation, temperature, position ids."""

import argparse
import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.transformer.module import MegatronModule

from pose_megatron.checkpoints.megatron import directory
from pose_megatron.checkpoints.megatron.args import from_args, to_args
from pose_megatron.checkpoints.megatron.common_state import read_common_state
from pose_megatron.checkpoints.megatron.hybrid_layout import gpt_args
from pose_megatron.config.model import resolve_scaling
from pose_megatron.errors import ConfigError, flag_name
from pose_megatron.megatron.flags import check_args, model_flags_of
from pose_megatron.models.families import family_named
from pose_megatron.models.gpt import install_pose, softmax_scale
from pose_megatron.models.hybrid import hybrid_stack_spec
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.scaling import RopeScaling


@dataclass(frozen=True)
class Rope:
    """How the positions of a run turn into angles.

    Attributes:
        max_position_embeddings: the target window T, in tokens.
        vocab_size: tokens that the samples may hold, without padding.
        model: the shape, where Hugging Face and our converter have one for it; None for a hybrid
            pattern with layers beside attention and MLP.
    """

    rope_scaling: RopeScaling
    rotary_base: float
    rotary_percent: float
    max_position_embeddings: int
    vocab_size: int
    model: ModelConfig | None

    def record(self) -> dict[str, Any]:
        """Plain values for a checkpoint, from which our tools read the interpolation."""
        if self.model is not None:
            return {"model": self.model.to_dict()}
        values = dataclasses.asdict(self)
        del values["model"]
        return {"rope": values}


def with_pose(config: Any, args: argparse.Namespace) -> Any:
    """Puts PoSE into the model that pretrain() builds.

    Args:
        config: what gpt_config_from_args or hybrid_config_from_args made of `args`.
        args: parsed with `add_pose_args`. They are stored in every checkpoint, and `pose_megatron`
            in them holds the interpolation.

    Returns:
        `config`, with the attention temperature and a hook that makes the model follow its position
        ids.

    Raises:
        ConfigError: a flag contradicts PoSE or the checkpoint; names the flag and the way out.
    """
    check_args(args)
    rope = resolve_rope(args)
    transformer = config.transformer
    scale = softmax_scale(transformer.kv_channels, rope.rotary_percent, rope.rope_scaling)
    if transformer.softmax_scale not in (None, scale):
        raise ConfigError(
            f"--softmax-scale {transformer.softmax_scale} contradicts the interpolation, whose "
            f"scale is {scale or 'the default'}; leave it out"
        )
    transformer.softmax_scale = scale
    # Megatron's kernel takes one row of angles for the whole batch; --fused-rotary has another.
    transformer.apply_rope_fusion = args.apply_rope_fusion = False
    config.rotary_base = args.rotary_base = rope.rotary_base
    if args.transformer_impl == "local":
        _use_torch_layers(config, rope.model)
    flags = model_flags_of(args)
    kernels = flags.fused_rotary, flags.fused_cross_entropy
    config.pre_wrap_hooks.append(partial(_install, rope, kernels))
    args.pose_megatron = rope.record()
    return config


def _install(
    rope: Rope, kernels: tuple[str, str], chunks: list[MegatronModule]
) -> list[MegatronModule]:
    how = rope.rope_scaling, rope.rotary_base, rope.rotary_percent, *kernels
    return [install_pose(chunk, *how) for chunk in chunks]


def _use_torch_layers(config: Any, model: ModelConfig | None) -> None:
    """Our layers instead of megatron-core's local ones, which have neither flash attention nor
    context parallelism; the weights have the same names."""
    family = family_named(model.family if model else "llama")

    def layers(config: Any, vp_stage: int | None = None):
        return family.layer_spec(config.transformer, "torch", vp_stage)

    if hasattr(config, "transformer_layer_spec"):
        config.transformer_layer_spec = layers
    else:
        config.hybrid_stack_spec = hybrid_stack_spec(config.transformer, "torch")


def resolve_rope(args: argparse.Namespace) -> Rope:
    """The rope on which Megatron's flags, PoSE's and the checkpoint agree.

    Raises:
        ConfigError: they contradict; names the flag, its value and the checkpoint's.
    """
    root = next((d for d in (args.load, args.pretrained_checkpoint) if _holds_checkpoint(d)), None)
    flags, target = model_flags_of(args), args.max_position_embeddings
    try:
        asked: ModelConfig | None = _model_of_args(args)
    except ConfigError:
        if args.hybrid_layer_pattern is None:
            raise
        asked = None  # other layers than attention and MLP
    if asked is None:
        return _rope_of_other_layers(args, root)
    if root is None:
        scaling = resolve_scaling(flags, target, args.seq_length, None)
        model = dataclasses.replace(asked, rope_scaling=scaling)
    else:
        loaded = directory.find(root, args.ckpt_step).model
        _check_shape(args, asked, loaded, root)
        scaling = resolve_scaling(flags, target, args.seq_length, loaded)
        model = dataclasses.replace(loaded, rope_scaling=scaling, max_position_embeddings=target)
    return Rope(scaling, model.rotary_base, model.rotary_percent, target, model.vocab_size, model)


def _holds_checkpoint(folder: str | None) -> bool:
    return folder is not None and directory.has_tracker(folder)  # as Megatron looks for it


def _model_of_args(args: argparse.Namespace) -> ModelConfig:
    """The shape that Megatron's flags give, with plain rope."""
    plain = {"rope_scaling_factor": 8.0}
    return from_args(gpt_args(vars(args) | plain), args.padded_vocab_size)


def _rope_of_other_layers(args: argparse.Namespace, root: str | None) -> Rope:
    """For a model that our converter does not know: only what the attention layers need."""
    if "*" not in args.hybrid_layer_pattern:
        raise ConfigError(
            f"--hybrid-layer-pattern {args.hybrid_layer_pattern} has no attention layer '*': "
            "nothing rotates, and PoSE has no effect"
        )
    loaded = None
    if root is not None:
        tracked = (Path(root) / directory.TRACKER).read_text(encoding="utf-8").strip()
        path = directory.path_of(Path(root), args.ckpt_step or tracked)
        stored = directory.stored_record(read_common_state(path)).get("rope")
        if stored is not None:
            scaling = RopeScaling(**stored["rope_scaling"])
            loaded = argparse.Namespace(**stored | {"rope_scaling": scaling})
    target = args.max_position_embeddings
    scaling = resolve_scaling(model_flags_of(args), target, args.seq_length, loaded)
    base = float(args.rotary_base)
    if loaded is not None and loaded.rotary_base != base:
        raise _contradiction("rotary_base", base, loaded.rotary_base, root)
    return Rope(scaling, base, args.rotary_percent, target, args.padded_vocab_size, None)


def _check_shape(
    args: argparse.Namespace, asked: ModelConfig, loaded: ModelConfig, root: str
) -> None:
    """That Megatron builds the checkpoint's model: --use-checkpoint-args takes most of it from
    there, but neither the norms' epsilon nor --qk-layernorm nor any interpolation."""
    if args.padded_vocab_size != loaded.padded_vocab_size:
        raise ConfigError(
            f"the vocabulary is padded to {args.padded_vocab_size} rows and that of the checkpoint "
            f"{root} to {loaded.padded_vocab_size}: give --use-checkpoint-args, or the "
            "--vocab-size and --make-vocab-size-divisible-by of the checkpoint"
        )
    agreed = {"max_position_embeddings", "rope_scaling", "family"}
    agreed |= {"vocab_size", "make_vocab_size_divisible_by"}
    # Some interpolations only change the base, and stock Megatron finds the changed one in args.
    stock = vars(to_args(loaded, 0, 0))["rotary_base"]
    for field in dataclasses.fields(loaded):
        given, stored = getattr(asked, field.name), getattr(loaded, field.name)
        if field.name in agreed or given == stored:
            continue
        if not (field.name == "rotary_base" and given == stock):
            raise _contradiction(field.name, given, stored, root)


def _contradiction(name: str, given: Any, stored: Any, root: str | None) -> ConfigError:
    flag = flag_name(name)
    way_out = f"give {flag}" if stored is True else f"leave {flag} out"
    if not isinstance(stored, bool):
        way_out = f"give {flag} {stored}"
    return ConfigError(
        f"{flag} {given} contradicts the checkpoint {root}, which has {stored}: {way_out}"
    )
