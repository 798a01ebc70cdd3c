"""Turns a corpus into token files that megatron-core's IndexedDataset reads.

Each line or row holds one document; its text under each of --json-keys becomes one document of
PREFIX_KEY_document.bin/.idx, in the order of the input and byte for byte what Megatron-LM's
preprocess_data.py writes. PREFIX_summary.json holds the counts.

gigatoken tokenizes the documents that are sure to get the ids of the tokenizer's own library, which
gets the others. Half a million characters of the corpus are compared at the start, and a few of
every part as it goes.

Outputs get their names when they are whole. An interrupted run leaves PREFIX.partial, and the same
command continues from it.
"""

import argparse
import os
from collections import Counter

from pose_megatron.commands.corpus_flags import add_corpus_flags
from pose_megatron.preprocessing.tokenizer import CONTROL_TOKENS_IN_TEXT, TOKENIZER_TYPES
from pose_megatron.runtime.cli import command, positive

EXAMPLE = """example:
  python tools/preprocess_data.py --input corpus.jsonl 'more/*.parquet' \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model models/llama-2-7b \\
      --output-prefix data/corpus --workers 8 --append-eod
"""


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_corpus_flags(p)
    p.add_argument("--output-prefix", required=True, help="the folder is created")
    p.add_argument("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    p.add_argument("--tokenizer-model", required=True, help="tokenizer file or folder")
    p.add_argument("--append-eod", action="store_true", help="end each document with the eos token")
    p.add_argument(
        "--eod-token",
        metavar="TOKEN|ID",
        help="end it with this one instead; a chat tokenizer's eos ends turns",
    )
    p.add_argument(
        "--control-tokens-in-text",
        choices=CONTROL_TOKENS_IN_TEXT,
        default="keep",
        help="what a control token that is written in a text becomes: keep: what the tokenizer's "
        "own library makes of it, mostly that token; split: ordinary text; fail: stop there "
        "[%(default)s]",
    )
    p.add_argument("--workers", type=positive, default=1, help="processes that tokenize")
    p.add_argument(
        "--tokenizer-library",
        choices=("auto", "own"),
        default="auto",
        help="auto: gigatoken where its ids are the same; own: never",
    )
    p.add_argument("--log-interval", type=positive, default=1000, help="documents between reports")
    p.add_argument(
        "--overwrite",
        action="store_true",
        help="replace existing outputs, and an unfinished run of something else",
    )
    return p.parse_args()


def sentence(summary: dict) -> str:
    """The summary in one line."""
    seconds, megabytes = max(summary["seconds"], 1e-3), summary["bytes"] / 1e6
    notes = {f"lines skipped ({reason})": n for reason, n in summary["skipped"].items()} | {
        "empty documents left out": summary["empty_documents"],
        "texts had lone surrogates, now U+FFFD": summary["texts_with_replaced_surrogates"],
    }
    return "; ".join(
        [
            f"{' '.join(o['prefix'] + '.bin/.idx' for o in summary['outputs'].values())}: "
            f"{summary['documents']:,} documents, {summary['tokens']:,} tokens from "
            f"{megabytes:.1f} MB in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s)",
            *(f"{count:,} {note}" for note, count in notes.items() if count),
            *_control_tokens(summary["control_tokens_in_text"]),
        ]
    )


def _control_tokens(found: dict) -> list[str]:
    """What became of the control tokens that are written in texts."""
    became = {"kept": "kept as control tokens", "split": "split as ordinary text"}
    return [
        f"{sum(found[how].values()):,} control tokens written in texts, {what} "
        f"({', '.join(f'{token} {n:,}' for token, n in Counter(found[how]).most_common(5))}"
        f"{', ...' if len(found[how]) > 5 else ''})"
        for how, what in became.items()
        if found[how]
    ]


@command
def main() -> None:
    flags = vars(parse())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker tokenizes on one thread
    from pose_megatron.preprocessing.preprocess import PreprocessingJob, preprocess

    json_keys = list(dict.fromkeys(flags.pop("json_keys")))
    print(sentence(preprocess(PreprocessingJob(json_keys=json_keys, **flags))))
