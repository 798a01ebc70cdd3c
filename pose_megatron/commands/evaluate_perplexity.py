"""Perplexity of a model by context length: by position in one pass, or in sliding windows."""

import argparse
import dataclasses
import math
from typing import TYPE_CHECKING

from pose_megatron.commands.target_flags import (
    add_target_flags,
    bos_of,
    introduce,
    open_tokenizer,
    target_of,
)
from pose_megatron.errors import ConfigError
from pose_megatron.evaluation.lengths import check_cut, check_stride
from pose_megatron.runtime.cli import command, positive
from pose_megatron.runtime.startup import prepare_megatron

if TYPE_CHECKING:
    from pose_megatron.evaluation.perplexity import Perplexity


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="How well a model foresees text, by how much of it stands before.\n\n"
        "By position (default): each document goes through the model once, and its tokens are\n"
        "scored in bins of position that end at the context lengths. The whole row costs what\n"
        "its longest length costs. Each bin scores other tokens: compare models in a bin.\n\n"
        "In sliding windows (--stride): every length scores the same tokens, so that lengths\n"
        "can be compared; each length is a pass of its own for every window.",
        epilog="examples:\n"
        "  python tools/evaluate_perplexity.py --load checkpoints/pose --bf16 \\\n"
        "      --data-path books_text_document --context-lengths 2048 4096 8192 16384 \\\n"
        "      --output results.jsonl\n"
        "  torchrun --nproc-per-node 8 tools/evaluate_perplexity.py --load checkpoints/70b \\\n"
        "      --tensor-model-parallel-size 4 --context-parallel-size 2 --bf16 \\\n"
        "      --data-path books_text_document --context-lengths 32768 131072",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_target_flags(parser)
    add = parser.add_argument
    add(
        "--data-path",
        required=True,
        help="corpus prefix; documents longer than the longest context length are used",
    )
    add("--stride", type=positive, help="sliding windows: tokens scored in each [by position]")
    add("--max-documents", type=positive, default=100, help="use at most this many [100]")
    add(
        "--max-document-tokens",
        type=positive,
        help="sliding windows: cut documents here [longest context plus 8 strides]",
    )
    return parser.parse_args()


@command
def main() -> None:
    flags = parse()
    if flags.stride:
        check_stride(flags.stride, flags.context_lengths)
    elif flags.max_document_tokens:
        raise ConfigError("--max-document-tokens has no effect without --stride")
    if flags.max_document_tokens:
        check_cut(flags.max_document_tokens, max(flags.context_lengths))
    prepare_megatron(flags.device)

    from pose_megatron.evaluation.corpus_text import files_of, long_documents
    from pose_megatron.evaluation.perplexity import Perplexities
    from pose_megatron.evaluation.progress import Progress
    from pose_megatron.evaluation.record import Record
    from pose_megatron.evaluation.target import find_target

    target = find_target(**target_of(flags))
    introduce(flags, target)
    longest, stride = target.lengths[-1], flags.stride
    end = longest + 1
    if stride:
        end = flags.max_document_tokens or longest + 8 * stride
    documents = long_documents(
        flags.data_path, longest, flags.max_documents, end, target.model.vocab_size
    )
    bos = bos_of(open_tokenizer(flags, target)) if flags.prepend_bos else None
    if bos is not None and bos >= target.model.vocab_size:
        raise ConfigError(
            f"--prepend-bos: token id {bos} is outside the checkpoint's vocabulary of "
            f"{target.model.vocab_size}: --tokenizer-model is of another model"
        )
    conditions = {
        "name": target.name,
        "metric": "perplexity",
        "measured": "in sliding windows" if stride else "by position",
        "stride": stride,
        "edges": None if stride else target.lengths,
        "data_path": flags.data_path,
        "prepend_bos": flags.prepend_bos,
        "tokenizer_model": flags.tokenizer_model if flags.prepend_bos else None,
        **target.row,
    }
    reader = target.open_reader(flags.batch_tokens)
    record = Record(flags.output, conditions, [*target.files, *files_of(flags.data_path)])

    lengths = target.lengths if stride else [longest]
    windows = sum(len(range(longest, len(document), stride or end)) for document in documents)
    with Progress(target.name, windows * sum(lengths)) as bar:
        bar.follow(reader, record)
        measured = Perplexities(reader, documents, target.lengths, record, bos, bar.say)
        for result in measured.in_windows(stride) if stride else measured.by_position():
            bar.say(f"{target.name}: {_said(result, target.lengths, stride)}")
            record.finish(dataclasses.asdict(result))


def _said(result: "Perplexity", lengths: list[int], stride: int | None) -> str:
    end = result.context_length
    what = f"context {end:>7,}"
    if not stride:
        start = max([0, *(length for length in lengths if length < end)])
        what = f"{start + 1:>7,} to {end:>7,} tokens before"
    error = "" if math.isnan(result.standard_error) else f" ± {result.standard_error:.3f}"
    return (
        f"{what}  perplexity {result.perplexity:.3f}  loss {result.loss:.3f}{error}  "
        f"({result.tokens:,} tokens of {result.documents} documents)"
    )
