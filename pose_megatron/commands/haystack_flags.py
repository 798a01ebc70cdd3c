"""The flags of evaluations that hide something in a text and ask for it."""

import argparse
from typing import TYPE_CHECKING, Any

from pose_megatron.commands.target_flags import bos_of, introduce, open_tokenizer, target_of
from pose_megatron.preprocessing.tokenizer import Tokenizer
from pose_megatron.runtime.cli import positive
from pose_megatron.runtime.ranges import LARGEST_SEED, real, whole

if TYPE_CHECKING:  # they need torch, and come after the flags are read
    from pose_megatron.evaluation.haystack import Hay
    from pose_megatron.evaluation.record import Record
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


def open_haystack(
    flags: argparse.Namespace,
) -> tuple["EvaluationTarget", Tokenizer, "Hay", list[int]]:
    """Introduces the model; with it, its tokenizer, the text of --data-path or filler, and the ids
    that every prompt begins with."""
    from pose_megatron.evaluation import corpus_text
    from pose_megatron.evaluation.haystack import filler
    from pose_megatron.evaluation.target import find_target

    target = find_target(**target_of(flags))
    introduce(flags, target)
    tokenizer = open_tokenizer(flags, target)
    first = [bos_of(tokenizer)] if flags.prepend_bos else []
    if flags.data_path:
        hay = corpus_text.haystack(flags.data_path, target.lengths[-1])
    else:
        hay = filler(tokenizer.tokenize)
    return target, tokenizer, hay, first


def open_record(
    flags: argparse.Namespace, target: "EvaluationTarget", metric: str, **conditions: Any
) -> "Record":
    """The record of this evaluation, once the ranks have met.

    Args:
        conditions: what results say beside the flags here and the model.
    """
    from pose_megatron.evaluation.corpus_text import files_of
    from pose_megatron.evaluation.record import Record

    names = ["trials", "seed", "data_path", "tokenizer_model", "prepend_bos"]
    shared = {name: getattr(flags, name) for name in names}
    return Record(
        flags.output,
        {"name": target.name, "metric": metric, **conditions, **shared, **target.row},
        [*target.files, *files_of(flags.data_path)],
    )
