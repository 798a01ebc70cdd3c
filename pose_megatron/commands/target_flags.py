"""The flags that every evaluation shares: which checkpoint, at which context lengths."""

import argparse

from pose_megatron.rope.names import METHOD_NAMES
from pose_megatron.runtime.cli import positive
from pose_megatron.runtime.ranges import LARGEST_INT32, real, whole


def add_target_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--load", required=True, help="Megatron checkpoint folder")
    add("--iteration", type=whole(0), help="default: the latest")
    add(
        "--context-lengths",
        type=whole(2, LARGEST_INT32),
        nargs="+",
        required=True,
        metavar="TOKENS",
    )
    add("--batch-tokens", type=positive, default=16384, help="input tokens of one forward pass")
    add(
        "--rope-scaling",
        choices=METHOD_NAMES,
        metavar="METHOD",
        help="interpolate a checkpoint that is not yet; methods as in pretrain_pose.py",
    )
    add(
        "--rope-scaling-factor",
        type=real(at_least=1),
        help="default: longest context / original window",
    )
    add("--rope-scaling-config", metavar="JSON", help="its other options, as in pretrain_pose.py")
    add("--bf16", action="store_true", help="compute in bfloat16 (default: float32)")
    add("--name", help="label in tables and plots (default: the folder's name)")
    add("--output", help="JSON lines file to append to")


def target_of(flags: argparse.Namespace) -> dict:
    """The arguments of `evaluation.target.find_target`."""
    names = ("load", "context_lengths", "iteration", "bf16", "name")
    rope = ("rope_scaling", "rope_scaling_factor", "rope_scaling_config")
    return {name: getattr(flags, name) for name in (*names, *rope)}
