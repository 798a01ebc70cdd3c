"""Flags of the programs that read a corpus of texts."""

import argparse

from pose_megatron.runtime.cli import positive


def add_corpus_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="files or patterns: .jsonl or .json, plain or with .gz or .zst; .parquet",
    )
    p.add_argument(
        "--json-keys", nargs="+", default=["text"], help="keys, or Parquet columns, of the texts"
    )
    p.add_argument(
        "--max-document-mb",
        type=positive,
        default=256,
        help="longest line or text; a longer one holds no document: it is bounded as memory is, a "
        "few times this per process [%(default)s]",
    )
    p.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at a line without a document: stop, or count it and continue",
    )
