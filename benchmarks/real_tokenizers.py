"""gigatoken beside the own libraries of real tokenizers, as `--tokenizer-library auto` uses it.

For each folder in FOLDER that holds a tokenizer.json or a tokenizer.model:

  code points  every one that this Python knows, but Han, Hangul and private ones (one in --step),
               each in a text of its own, beside letters, a digit, spaces, and itself
  characters   of the texts compared: those, source code of the standard library, and random strings
               of common and rare characters
  own          documents (files of source code) that went to the own library
  times        rate on the source code over the own library's, on one thread, caches empty

The ids must be equal, or the program fails. docs/benchmarks.md, "Real tokenizers", says how to
fill the folder.
"""

import argparse
import json
import os
import random
import sys
import sysconfig
import time
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np

os.environ["TOKENIZERS_PARALLELISM"] = "false"
from pose_megatron.preprocessing.fast_tokenizer import FastTokenizer, prove
from pose_megatron.preprocessing.tokenizer import Tokenizer, build_tokenizer

PIECES = (*"ab eE1!-_=<>|.\n\t'▁", "  ", "the", "e\u0301", "日本", "\r\n", "<s>", "'ll", "erere")
STRINGS = 3000


def code_points(step: int) -> list[str]:
    known = [
        chr(c) for c in range(0x30000) if unicodedata.category(chr(c)) not in {"Cn", "Cs", "Co"}
    ]
    names = ("CJK UNIFIED", "HANGUL SYLLABLE", "TANGUT", "EGYPTIAN", "CUNEIFORM")
    return [c for c in known if not unicodedata.name(c, "").startswith(names)][::step]


def random_strings(characters: list[str]) -> list[str]:
    draw = random.Random(1)
    rare = draw.sample(characters, min(2000, len(characters)))
    return [
        "".join(
            draw.choice(PIECES) if draw.random() < 0.95 else draw.choice(rare)
            for _ in range(draw.randint(1, 60))
        )
        for _ in range(STRINGS)
    ]


def documents() -> list[str]:
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path.read_text("utf-8", "replace") for path in paths[:100]]


def rates(fast: FastTokenizer, tokenizer: Tokenizer, texts: list[str]) -> dict:
    """Compares the ids of the texts; MB/s of both in processor time."""
    megabytes, before = sum(len(text.encode()) for text in texts) / 1e6, fast.own_texts
    clocks = [time.process_time()]
    ours = fast.tokenize_batch(texts)
    clocks.append(time.process_time())
    theirs = tokenizer.tokenize_batch(texts)
    clocks.append(time.process_time())
    for text, one, other in zip(texts, ours, theirs, strict=True):
        assert np.array_equal(one, other), f"other ids on {text[:60]!r}"
    ours_mb, theirs_mb = (megabytes / (b - a) for a, b in pairwise(clocks))
    return {
        "texts": len(texts),
        "characters": sum(map(len, texts)),
        "own": fast.own_texts - before,
        "MB/s": round(ours_mb, 1),
        "own MB/s": round(theirs_mb, 1),
        "times": round(ours_mb / theirs_mb, 1),
    }


def measure(folder: Path, step: int) -> dict:
    kind = "HuggingFace" if (folder / "tokenizer.json").exists() else "SentencePiece"
    tokenizer = build_tokenizer(f"{kind}Tokenizer", folder)
    started = time.process_time()
    fast, why = prove(tokenizer, [])
    if not fast:
        return {"why not": why}
    start_up = time.process_time() - started
    characters = code_points(step)
    return {
        "start-up, s": round(start_up, 1),
        "source": rates(fast, tokenizer, documents()),
        "code points": rates(
            fast, tokenizer, [f"ab{c} c{c}{c}d 1{c} {c}\n{c}" for c in characters]
        ),
        "random": rates(fast, tokenizer, random_strings(characters)),
    }


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folder", type=Path, help="holds a folder for each tokenizer")
    p.add_argument("--step", type=int, default=1, help="take one code point of so many")
    p.add_argument("--output", type=Path, help="file for the results, as JSON")
    flags = p.parse_args()
    results = {}
    print("| tokenizer | code points | characters | own | MB/s | times |")
    print("|---|---:|---:|---:|---:|---:|")
    for folder in sorted(path for path in flags.folder.iterdir() if path.is_dir()):
        if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
            continue
        results[folder.name] = found = measure(folder, flags.step)
        if "why not" in found:
            print(f"| {folder.name} | {found['why not']} |", flush=True)
            continue
        parts = [found[name] for name in ("source", "code points", "random")]
        print(
            f"| {folder.name} | {parts[1]['texts']:,} | {sum(p['characters'] for p in parts):,} "
            f"| {parts[0]['own']} of {parts[0]['texts']} | {parts[0]['MB/s']} "
            f"| {parts[0]['times']} |",
            flush=True,
        )
        if flags.output:
            flags.output.write_text(json.dumps(results, indent=2) + "\n")
    if not results:
        sys.exit(f"{flags.folder}: no folder in it holds a tokenizer.json or tokenizer.model")


if __name__ == "__main__":
    main()
