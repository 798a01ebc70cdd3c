"""Compares a Megatron checkpoint with its Hugging Face export, frequency by frequency and logit by
logit."""

import argparse
from pathlib import Path

from pose_megatron.errors import ConfigError
from pose_megatron.runtime.cli import command, progress
from pose_megatron.runtime.ranges import LARGEST_SEED, whole
from pose_megatron.runtime.startup import prepare_megatron


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compares the rope, then runs both models in float32 on the same random "
        "tokens,\nat plain positions and at both ends of the extended window, and prints the "
        "largest\ndifference between logits.",
        epilog="example:\n"
        "  python tools/checkpoint/verify.py --megatron checkpoints/pose --hf models/pose",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--megatron", required=True, help="Megatron checkpoint folder")
    parser.add_argument(
        "--iteration", type=whole(0), help="the one of --megatron to compare [the latest]"
    )
    parser.add_argument("--hf", required=True, type=Path, help="Hugging Face folder")
    parser.add_argument("--tokens", type=whole(2), default=128, help="length of the rows [128]")
    parser.add_argument(
        "--seed", type=whole(0, LARGEST_SEED), default=0, help="what the tokens are drawn with [0]"
    )
    return parser.parse_args()


@command
def main() -> None:
    flags = parse()
    if not (flags.hf / "config.json").is_file():
        raise ConfigError(f"--hf {flags.hf} is not a Hugging Face model: it has no config.json")
    prepare_megatron()
    from pose_megatron.checkpoints.huggingface import rope_check
    from pose_megatron.checkpoints.megatron.directory import find
    from pose_megatron.evaluation import parity

    found = find(flags.megatron, flags.iteration)
    bounds = rope_check.bounds(found.model)
    for name, error in rope_check.rope_errors(flags.hf, found.model).items():
        print(f"rope {name}: relative error {error:.1e} (bound {bounds[name].max():.0e})")
    parity.check(found, flags.hf, flags.tokens, flags.seed, say=progress("verify"))
