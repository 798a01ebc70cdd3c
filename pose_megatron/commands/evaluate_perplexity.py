"""Sliding-window perplexity of a Megatron checkpoint at several context lengths."""

import argparse
import dataclasses

from pose_megatron.commands.target_flags import add_target_flags, bos_of, open_tokenizer, target_of
from pose_megatron.errors import ConfigError
from pose_megatron.evaluation.lengths import check_cut, check_stride
from pose_megatron.runtime.cli import command, positive
from pose_megatron.runtime.startup import prepare_megatron


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Perplexity at each context length, over the same documents and the same\n"
        "scored tokens, so that the lengths can be compared.",
        epilog="example:\n  python tools/evaluate_perplexity.py --load checkpoints/pose \\\n"
        "      --data-path books_text_document --context-lengths 2048 4096 8192 16384 \\\n"
        "      --output results.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_target_flags(parser)
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
    add("--max-documents", type=positive, default=100, help="use at most this many (default: 100)")
    add(
        "--max-document-tokens",
        type=positive,
        help="cut documents to this length (default: longest context plus 8 strides)",
    )
    return parser.parse_args()


@command
def main() -> None:
    flags = parse()
    if flags.stride:
        check_stride(flags.stride, flags.context_lengths)
    if flags.max_document_tokens:
        check_cut(flags.max_document_tokens, max(flags.context_lengths))
    prepare_megatron()
    from tqdm import tqdm

    from pose_megatron.evaluation.corpus_text import long_documents
    from pose_megatron.evaluation.perplexity import perplexities
    from pose_megatron.evaluation.results import append
    from pose_megatron.evaluation.target import find_target
    from pose_megatron.runtime.distributed import device

    target = find_target(**target_of(flags))
    print(f"{target.name}: rope scaling {target.model.rope_scaling}", flush=True)
    shortest, longest = target.lengths[0], target.lengths[-1]
    stride = flags.stride or shortest // 2
    documents = long_documents(
        flags.data_path,
        longest,
        flags.max_documents,
        flags.max_document_tokens or longest + 8 * stride,
        target.model.vocab_size,
    )
    bos = bos_of(open_tokenizer(flags, target)) if flags.prepend_bos else None
    if bos is not None and bos >= target.model.vocab_size:
        raise ConfigError(
            f"--prepend-bos: token id {bos} is outside the checkpoint's vocabulary of "
            f"{target.model.vocab_size}: --tokenizer-model is of another model"
        )
    documents = [document.to(device()) for document in documents]
    logits = target.load_logits()

    windows = sum((len(document) - longest - 1) // stride + 1 for document in documents)
    with tqdm(
        total=windows * sum(target.lengths),
        unit="token",
        unit_scale=True,
        desc=target.name,
        disable=None,
    ) as bar:
        results = list(
            perplexities(
                logits, documents, target.lengths, stride, flags.batch_tokens, bar.update, bos
            )
        )
    for r in results:
        print(
            f"{target.name}: context {r.context_length:>7,}  perplexity {r.perplexity:.3f}  "
            f"({r.tokens:,} tokens of {r.documents} documents)"
        )
    what = {"name": target.name, "metric": "perplexity"}
    how = {"stride": stride, "data_path": flags.data_path, "prepend_bos": flags.prepend_bos}
    how["tokenizer_model"] = flags.tokenizer_model if flags.prepend_bos else None
    append(flags.output, (what | dataclasses.asdict(r) | how | target.row for r in results))
