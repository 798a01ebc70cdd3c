"""Writes a corpus of pairs to recall, between pieces of another corpus, and one of their symbols.

    python examples/reproduce/recall_corpus.py corpus/train.jsonl corpus

makes corpus/recall.jsonl, and corpus/symbols.jsonl to train a tokenizer on: each symbol is a
document of its own, so that none is joined with another.
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

import recall

DOCUMENTS, CHARACTERS = 8000, 800  # of text in each
REPEATED = 3000  # times each symbol, for a tokenizer that leaves out rare characters


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, help="JSON lines with a text each")
    parser.add_argument("folder", type=Path, help="for recall.jsonl and symbols.jsonl")
    flags = parser.parse_args()
    draw = random.Random(1234)
    texts = [json.loads(line)["text"] for line in flags.texts.read_text().splitlines()]
    texts = [text for text in texts if len(text) > CHARACTERS]
    write(flags.folder / "recall.jsonl", (piece(draw, texts) for _ in range(DOCUMENTS)))
    write(flags.folder / "symbols.jsonl", recall.SYMBOLS * REPEATED)


def piece(draw: random.Random, texts: list[str]) -> str:
    text = draw.choice(texts)
    at = draw.randrange(len(text) - CHARACTERS)
    return recall.document(draw, text[at : at + CHARACTERS])


def write(path: Path, texts: Iterable[str]) -> None:
    with open(path, "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


if __name__ == "__main__":
    main()
