"""Writes the source of installed Python packages as a corpus of long documents.

    python examples/packages_corpus.py FOLDER --long 700000

A document is files of one package, in the order of their paths, each below a comment that names it,
until it has so many characters, as single files hardly have. This project needs all of these
packages; of those that are held out nothing is trained on. Tests are left out.
"""

import argparse
import importlib.util
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

TRAINED_ON = ("torch", "transformers", "numpy", "huggingface_hub", "pyarrow")
HELD_OUT = ("sympy", "networkx", "matplotlib")
LEFT_OUT = {"test", "tests", "testing", "__pycache__"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder for train.jsonl and test.jsonl")
    parser.add_argument(
        "--long",
        type=int,
        default=500_000,
        metavar="CHARACTERS",
        help="of a document, at least [500,000]",
    )
    flags = parser.parse_args()
    flags.output.mkdir(parents=True, exist_ok=True)
    for part, packages in (("train", TRAINED_ON), ("test", HELD_OUT)):
        of_each = [list(documents(package, flags.long)) for package in packages]
        # In turn, so that the first few are of all packages.
        texts = [text for texts in itertools.zip_longest(*of_each) for text in texts if text]
        with open(flags.output / f"{part}.jsonl", "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        size = sum(map(len, texts))
        print(f"{part}: {len(texts)} documents of {', '.join(packages)}, {size / 1e6:.1f} MB")


def documents(package: str, characters: int) -> Iterator[str]:
    """Of a package; the last one, which is shorter, only where it is the only one.

    Raises:
        SystemExit: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{package} is not installed: make, or pip install -e '.[dev]', installs it")
    root = Path(spec.submodule_search_locations[0])
    text, whole = "", 0
    for path in sorted(root.rglob("*.py")):
        if LEFT_OUT & set(path.relative_to(root).parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        text += f"# {path.relative_to(root.parent)}\n{source}\n"
        if len(text) >= characters:
            yield text
            text, whole = "", whole + 1
    if text and not whole:
        yield text


if __name__ == "__main__":
    main()
