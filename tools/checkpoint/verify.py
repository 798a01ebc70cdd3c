"""Compares a Megatron checkpoint with its Hugging Face export, frequency by frequency and logit by
logit."""

import os
import sys

# Not this folder: its inspect.py would hide Python's own from all that is imported below.
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:] = [ROOT, *(path for path in sys.path if os.path.abspath(path) != HERE)]

import argparse
from pathlib import Path

from pose_megatron.runtime.startup import prepare_megatron

prepare_megatron()

from pose_megatron.checkpoints.huggingface import rope_check
from pose_megatron.checkpoints.megatron import directory
from pose_megatron.evaluation import parity
from pose_megatron.runtime.cli import command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compares the rope, then runs both models in float32 on the same random "
        "tokens,\nat plain positions and at both ends of the extended window, and prints the "
        "largest\ndifference of a logit.",
        epilog="example:\n"
        "  python tools/checkpoint/verify.py --megatron checkpoints/pose --hf models/pose",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--megatron", required=True, help="Megatron checkpoint folder")
    parser.add_argument("--iteration", type=int, help="of --megatron (default: the latest)")
    parser.add_argument("--hf", required=True, type=Path, help="Hugging Face folder")
    parser.add_argument("--tokens", type=int, default=128, help="per row (default: 128)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@command
def main() -> None:
    flags = parse()
    if not (flags.hf / "config.json").is_file():
        raise ValueError(f"--hf {flags.hf} is not a Hugging Face model: it has no config.json")
    if flags.tokens < 2:
        raise ValueError(f"--tokens {flags.tokens} must be at least 2")
    found = directory.find(flags.megatron, flags.iteration)
    bounds = rope_check.bounds(found.model.rope_scaling)
    for name, error in rope_check.rope_errors(flags.hf, found.model).items():
        print(f"rope {name}: relative error {error:.1e} (bound {bounds[name]:.0e})")
    parity.check(found, flags.hf, flags.tokens, flags.seed)


if __name__ == "__main__":
    sys.exit(main())
