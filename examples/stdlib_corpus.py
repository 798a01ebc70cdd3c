"""Writes the Python standard library's source as a corpus: each file a document, some held out.

A real text that is present on every machine. Tests, installed packages and the tables of
character encodings are left out.
"""

import argparse
import json
import sysconfig
from pathlib import Path

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder for train.jsonl and test.jsonl")
    parser.add_argument(
        "--long",
        type=int,
        metavar="CHARACTERS",
        help="hold out 1 in 4 of the files above this length [1 in 20 of all files]",
    )
    flags = parser.parse_args()
    folder = flags.output
    folder.mkdir(parents=True, exist_ok=True)
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if not LEFT_OUT & set(p.parts))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    if flags.long:
        held_out = set([i for i, text in enumerate(texts) if len(text) > flags.long][2::4])
    else:
        held_out = set(range(7, len(texts), 20))
    with open(folder / "train.jsonl", "w") as train, open(folder / "test.jsonl", "w") as test:
        for number, text in enumerate(texts):
            (test if number in held_out else train).write(json.dumps({"text": text}) + "\n")
    size = sum(map(len, texts))
    print(f"{len(paths)} files of {root}, {size / 1e6:.1f} MB, {len(held_out)} held out")


if __name__ == "__main__":
    main()
