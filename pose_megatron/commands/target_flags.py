"""The flags that every evaluation shares: which checkpoint, at which context lengths."""

import argparse

from pose_megatron.runtime.cli import positive


def add_target_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--load", required=True, help="Megatron checkpoint folder")
    add("--iteration", type=int, help="default: the latest")
    add("--context-lengths", type=positive, nargs="+", required=True, metavar="TOKENS")
    add("--batch-tokens", type=positive, default=16384, help="input tokens of one forward pass")
    add(
        "--rope-scaling",
        type=_rope_method,
        metavar="METHOD",
        help="interpolate a checkpoint that is not yet; methods as in pretrain_pose.py",
    )
    add("--rope-scaling-factor", type=float, help="default: longest context / original window")
    add("--rope-scaling-config", metavar="JSON", help="its other options, as in pretrain_pose.py")
    add("--bf16", action="store_true", help="compute in bfloat16 (default: float32)")
    add("--name", help="label in tables and plots (default: the folder's name)")
    add("--output", help="JSON lines file to append to")


def target_of(flags: argparse.Namespace) -> dict:
    """The arguments of `evaluation.target.find_target`."""
    names = ("load", "context_lengths", "iteration", "bf16", "name")
    rope = ("rope_scaling", "rope_scaling_factor", "rope_scaling_config")
    return {name: getattr(flags, name) for name in (*names, *rope)}


def _rope_method(name: str) -> str:
    """One of rope's METHODS, as argparse's `type`: only a given flag waits for torch."""
    from pose_megatron.rope.scaling import METHODS

    if name not in METHODS:
        raise argparse.ArgumentTypeError(
            f"invalid choice: {name!r} (choose from {', '.join(map(repr, METHODS))})"
        )
    return name
