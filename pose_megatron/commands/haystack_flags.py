"""The flags of evaluations that hide something in a text and ask for it."""

import argparse
from typing import TYPE_CHECKING

from pose_megatron.preprocessing.tokenizer import Tokenizer
from pose_megatron.runtime.cli import positive
from pose_megatron.runtime.ranges import LARGEST_SEED, real, whole

if TYPE_CHECKING:  # they need torch, and come after the flags are read
    from pose_megatron.evaluation.haystack import Hay
    from pose_megatron.evaluation.target import EvaluationTarget


def add_haystack_flags(parser: argparse.ArgumentParser, drawn: str) -> None:
    """
    Args:
        drawn: what depends on the seed.
    """
    add = parser.add_argument
    add("--trials", type=positive, default=50, help="texts per context length [50]")
    add("--data-path", help="corpus prefix whose text is the haystack [filler]")
    add(
        "--seed",
        type=whole(0, LARGEST_SEED),
        default=1234,
        help=f"seed of {drawn} [1234]",
    )
    add(
        "--threshold",
        type=real(above=0, at_most=1),
        default=0.85,
        help="share of answers up to which a context length counts as effective [0.85]",
    )


def hay_of(flags: argparse.Namespace, tokenizer: Tokenizer, target: "EvaluationTarget") -> "Hay":
    """The text of --data-path, or filler."""
    from pose_megatron.evaluation import corpus_text
    from pose_megatron.evaluation.haystack import filler

    if flags.data_path:
        return corpus_text.haystack(flags.data_path, target.lengths[-1])
    return filler(tokenizer.tokenize)


def conditions_of(flags: argparse.Namespace) -> dict:
    """What results say of these flags."""
    names = ["trials", "seed", "data_path", "tokenizer_model", "prepend_bos"]
    return {name: getattr(flags, name) for name in names}
