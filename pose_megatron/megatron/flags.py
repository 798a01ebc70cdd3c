"""PoSE's flags beside Megatron's, and Megatron's that contradict them."""

import argparse
import dataclasses
import typing

import torch

from pose_megatron.config.arguments import options
from pose_megatron.config.flags import (
    Arguments,
    DataFlags,
    ModelFlags,
    PositionFlags,
    TrainingFlags,
)
from pose_megatron.errors import ConfigError, flag_name
from pose_megatron.megatron.startup import CPU_DEFAULTS
from pose_megatron.runtime.ranks import print_rank_0

# The flags that Megatron does not have; all others of these groups are its own.
_OURS = {
    PositionFlags: tuple(f.name for f in dataclasses.fields(PositionFlags)),
    DataFlags: ("data_mode", "packed_skips", "materialized", "short_documents"),
    ModelFlags: (
        *("original_max_position_embeddings", "rope_scaling", "rope_scaling_config"),
        *("fused_rotary", "fused_cross_entropy"),
    ),
}
# Megatron's flags that change positions, angles or samples, and the way out.
_REFUSED = {
    "use_rope_scaling": "give --rope-scaling llama3 instead",
    "rotary_seq_len_interpolation_factor": "give --rope-scaling linear instead",
    "reset_position_ids": "samples have skip-wise positions",
    "reset_attention_mask": "samples are dense and causal",
    "eod_mask_loss": "every token of a sample counts",
    "dataloader_inter_document_masking": "samples are dense and causal",
    "sft": "samples are dense and causal, and packed (THD) sequences are not supported",
    "hybrid_context_parallel": "it packs sequences (THD), which are not supported",
    "dynamic_context_parallel": "it packs sequences (THD), which are not supported",
    "mtp_num_layers": "multi-token prediction shifts tokens but not angles",
    "multi_latent_attention": "it rotates without the position ids",
    "experimental_attention_variant": "it may rotate without the position ids",
    "fim_data": "the text of a sample is the corpus' own",
    "mock_data": "name a corpus with --data-path",
    "full_validation": "give --eval-iters",
    "multiple_validation_sets": "give one blend with --valid-data-path",
    "phase_transition_iterations": "give --pose-target-schedule for a window that grows",
    "per_split_data_args_path": "give --train-data-path, --valid-data-path and --test-data-path",
    "perform_rl_step": "PoSE is for pretraining",
    "no_rope_freq": "every attention layer rotates",
    "inference_dynamic_batching": "PoSE is for training",
}


def add_pose_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds PoSE's flags to Megatron's parser: its `extra_args_provider`.

    Without CUDA it also sets the defaults that Megatron needs there.
    """
    section = parser.add_argument_group("PoSE")
    for group, names in _OURS.items():
        for field in dataclasses.fields(group):
            if field.name in names:
                section.add_argument(flag_name(field.name), default=None, **options(field))
    # Megatron's own default, 8, could not be told from what a user wrote.
    parser.set_defaults(rope_scaling_factor=None)
    if not torch.cuda.is_available():
        parser.set_defaults(**CPU_DEFAULTS)
        print_rank_0("no CUDA: --distributed-backend gloo, --transformer-impl local, no fusions")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuses Megatron's flags that contradict PoSE, and numbers out of the ranges of ours.

    Raises:
        ConfigError: names the flag, its value and the way out.
    """
    arguments_of(args), model_flags_of(args)
    if args.position_embedding_type != "rope":
        raise ConfigError(
            f"--position-embedding-type {args.position_embedding_type}: PoSE needs rope"
            + ("; give --rope-scaling yarn" if args.position_embedding_type == "yarn" else "")
        )
    for name, reason in _REFUSED.items():
        if (value := getattr(args, name, None)) not in (None, False):
            shown = "" if value is True else f" {value}"
            raise ConfigError(f"{flag_name(name)}{shown} contradicts PoSE: {reason}")
    if args.max_position_embeddings < args.seq_length:
        raise ConfigError(
            f"--max-position-embeddings {args.max_position_embeddings} is the target window and "
            f"must be at least --seq-length {args.seq_length}"
        )


def arguments_of(args: argparse.Namespace) -> Arguments:
    """The data and position flags and the seed of a run of Megatron's, as our own."""

    def group(kind: type):
        known = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(kind)}
        return kind(**{name: value for name, value in known.items() if value is not None})

    groups = {name: kind() for name, kind in typing.get_type_hints(Arguments).items()}
    return Arguments(
        **groups
        | {
            "data": group(DataFlags),
            "position": group(PositionFlags),
            "training": TrainingFlags(seed=args.seed),
        }
    )


def model_flags_of(args: argparse.Namespace) -> ModelFlags:
    """The rotary flags and the kernels of a run of Megatron's, as our own."""
    return ModelFlags(
        rope_scaling=args.rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        rope_scaling_config=args.rope_scaling_config,
        original_max_position_embeddings=args.original_max_position_embeddings,
        fused_rotary=getattr(args, "fused_rotary", None) or "auto",
        fused_cross_entropy=getattr(args, "fused_cross_entropy", None) or "auto",
    )
