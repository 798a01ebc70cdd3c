"""Sliding-window perplexity of a Megatron checkpoint at several context lengths."""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pose_megatron.runtime.startup import prepare_megatron

prepare_megatron()

import torch
from tqdm import tqdm

from pose_megatron.data.indexed_corpus import IndexedCorpus
from pose_megatron.evaluation import target
from pose_megatron.evaluation.perplexity import perplexities
from pose_megatron.runtime import distributed
from pose_megatron.runtime.cli import command, positive


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Perplexity at each context length, over the same documents and the same\n"
        "scored tokens, so that the row is comparable.",
        epilog="example:\n  python tools/evaluate_perplexity.py --load checkpoints/pose \\\n"
        "      --data-path books_text_document --context-lengths 2048 4096 8192 16384 \\\n"
        "      --output results.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    target.add_flags(parser)
    add = parser.add_argument
    add(
        "--data-path",
        required=True,
        help="corpus prefix; documents longer than the longest context length are used",
    )
    add(
        "--stride",
        type=positive,
        help="tokens scored per window (default: half the shortest context)",
    )
    add("--max-documents", type=positive, default=100, help="the first so many (default: 100)")
    add(
        "--max-document-tokens",
        type=positive,
        help="cut documents (default: longest context plus 8 strides)",
    )
    return parser.parse_args()


@command
def main() -> None:
    flags = parse()
    tested = target.resolve(flags)
    lengths, name = tested.lengths, tested.name
    stride = flags.stride or lengths[0] // 2
    documents = read_documents(flags, lengths[-1], stride, tested.model.vocab_size)
    logits = tested.logits()

    scored = sum((len(d) - lengths[-1] - 1) // stride + 1 for d in documents)
    with tqdm(
        total=scored * sum(lengths), unit="token", unit_scale=True, desc=name, disable=None
    ) as bar:
        results = list(
            perplexities(logits, documents, lengths, stride, flags.batch_tokens, bar.update)
        )
    for r in results:
        print(
            f"{name}: context {r.context_length:>7,}  perplexity {r.perplexity:.3f}  "
            f"({r.tokens:,} tokens of {r.documents} documents)"
        )
    target.append(
        flags.output,
        (
            {
                "name": name,
                "metric": "perplexity",
                **dataclasses.asdict(r),
                "stride": stride,
                "data_path": flags.data_path,
                **tested.row,
            }
            for r in results
        ),
    )


def read_documents(flags, longest: int, stride: int, vocab_size: int) -> list[torch.Tensor]:
    corpus = IndexedCorpus(flags.data_path)
    cut = flags.max_document_tokens or longest + 8 * stride
    if cut <= longest:
        raise ValueError(
            f"--max-document-tokens {cut} must exceed the longest context length, {longest}"
        )
    long_enough = (corpus.lengths > longest).nonzero()[0][: flags.max_documents]
    if not len(long_enough):
        raise ValueError(
            f"--data-path {flags.data_path}: no document has more than {longest} tokens, the "
            f"longest context length (the longest has {corpus.lengths.max()})"
        )
    documents = []
    for i in long_enough.tolist():
        tokens = corpus.tokens.get(i, 0, min(cut, int(corpus.lengths[i])))
        if tokens.max() >= vocab_size:
            raise ValueError(
                f"--data-path {flags.data_path}: token id {tokens.max()} in document {i} is "
                f"outside the checkpoint's vocabulary of {vocab_size}"
            )
        documents.append(torch.from_numpy(tokens.astype("int64")).to(distributed.device()))
    return documents


if __name__ == "__main__":
    sys.exit(main())
