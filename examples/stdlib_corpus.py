"""Writes the Python standard library's source as a corpus: each file a document, 1 in 20 held out.

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
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if not LEFT_OUT & set(p.parts))
    size = 0
    with open(folder / "train.jsonl", "w") as train, open(folder / "test.jsonl", "w") as test:
        for number, path in enumerate(paths):
            text = path.read_text(encoding="utf-8", errors="replace")
            size += len(text)
            (test if number % 20 == 7 else train).write(json.dumps({"text": text}) + "\n")
    print(f"{len(paths)} files of {root}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
