"""Passkey retrieval of a Megatron checkpoint at several context lengths."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pose_megatron.runtime.startup import prepare_megatron

prepare_megatron()

import numpy as np
from tqdm import tqdm

from pose_megatron.data.indexed_corpus import IndexedCorpus
from pose_megatron.evaluation import passkey, target
from pose_megatron.positions.draws import Draw
from pose_megatron.preprocessing.tokenizer import TOKENIZER_TYPES, build_tokenizer
from pose_megatron.runtime import distributed
from pose_megatron.runtime.cli import command, positive


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="How often the model finds a number that was given to a name anywhere in its\n"
        "window. The prompts have exactly the context length, the place goes from the front\n"
        "to the back, and greedy decoding must give the whole number.",
        epilog="example:\n  python tools/evaluate_passkey.py --load checkpoints/pose --bf16 \\\n"
        "      --context-lengths 4096 16384 65536 --needles 8 --data-path books_text_document \\\n"
        "      --output results.jsonl\n"
        "  python tools/plot_results.py results.jsonl --metric passkey --output passkey.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    target.add_flags(parser)
    add = parser.add_argument
    add("--trials", type=positive, default=50, help="prompts per context length (default: 50)")
    add(
        "--needles",
        type=positive,
        default=1,
        help="names with numbers in each, of which one is asked for (default: 1)",
    )
    add("--data-path", help="corpus prefix whose text is the haystack (default: filler)")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, default="HuggingFaceTokenizer")
    add("--tokenizer-model", help="default: the one that the checkpoint carries")
    add("--prepend-bos", action="store_true", help="begin with the token that begins a sequence")
    add("--seed", type=int, default=1234, help="of names, numbers and places (default: 1234)")
    return parser.parse_args()


@command
def main() -> None:
    flags = parse()
    tested = target.resolve(flags)
    tokenizer = open_tokenizer(flags, tested)
    first = []
    if flags.prepend_bos:
        if tokenizer.bos is None:
            raise ValueError("--prepend-bos: the tokenizer has no such token")
        first = [tokenizer.bos]
    haystack = passkey.filler(tokenizer.tokenize)
    if flags.data_path:
        haystack = text_of(IndexedCorpus(flags.data_path), tested.lengths[-1])
    asked = {
        length: passkey.prompts(
            tokenizer.tokenize, haystack, length, flags.trials, flags.needles, flags.seed, first
        )
        for length in tested.lengths
    }
    largest = max(int(prompt.tokens.max()) for some in asked.values() for prompt in some)
    if largest >= tested.model.vocab_size:
        raise ValueError(
            f"token id {largest} is outside the checkpoint's vocabulary of "
            f"{tested.model.vocab_size}: --tokenizer-model or --data-path is of another model"
        )
    logits = tested.logits()

    rows = []
    with tqdm(
        total=flags.trials * sum(tested.lengths),
        unit="token",
        unit_scale=True,
        desc=tested.name,
        disable=None,
    ) as bar:
        for length, questions in asked.items():
            answers = list(
                passkey.answers(
                    lambda tokens, last: logits(tokens.to(distributed.device()), last),
                    questions,
                    flags.batch_tokens,
                    bar.update,
                )
            )
            found = sum(answer.found for answer in answers)
            low, high = passkey.interval(found, flags.trials)
            rows.append(
                {
                    "name": tested.name,
                    "metric": "passkey",
                    "context_length": length,
                    "passkey": found / flags.trials,
                    "low": low,
                    "high": high,
                    "loss": sum(answer.loss for answer in answers) / flags.trials,
                    "trials": flags.trials,
                    "needles": flags.needles,
                    "seed": flags.seed,
                    "data_path": flags.data_path,
                    **tested.row,
                    "answers": [[a.depth, a.found, round(a.loss, 4)] for a in answers],
                }
            )
    for row in rows:
        print(
            f"{tested.name}: context {row['context_length']:>7,}  found {row['passkey']:6.1%}  "
            f"(95 % interval {row['low']:.0%} to {row['high']:.0%})  "
            f"loss per token of the answer {row['loss']:.3f}"
        )
    target.append(flags.output, rows)


def open_tokenizer(flags, tested: target.Subject):
    """The tokenizer that the flags name, or the checkpoint's."""
    path = flags.tokenizer_model or tested.found.root / "tokenizer"
    if not flags.tokenizer_model and not path.is_dir():
        raise ValueError(
            f"--load {flags.load} carries no tokenizer; name one with --tokenizer-model"
        )
    return build_tokenizer(flags.tokenizer_type, path)


def text_of(corpus: IndexedCorpus, longest: int):
    """A haystack of a corpus's text, from a drawn document on."""
    total = int(corpus.lengths.sum(dtype=np.int64))
    if total < longest:
        raise ValueError(
            f"--data-path {corpus.prefix} has {total} tokens, fewer than the longest "
            f"context length, {longest}"
        )

    def haystack(draw: Draw, count: int) -> np.ndarray:
        document, parts = draw.integer(0, len(corpus.lengths) - 1), []
        while count > 0:
            take = min(count, int(corpus.lengths[document]))
            parts.append(corpus.tokens.get(document, 0, take).astype(np.int64))
            count -= take
            document = (document + 1) % len(corpus.lengths)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    return haystack


if __name__ == "__main__":
    sys.exit(main())
