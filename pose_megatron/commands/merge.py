"""Joins token files: the documents of all shards in order, as if their texts had been one corpus.

Shards are the token files that preprocess_data.py, ours or Megatron-LM's, wrote with the same
tokenizer, for example on several machines. PREFIX.bin/.idx get their names when they are whole.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pose_megatron.errors import ConfigError
from pose_megatron.runtime.cli import command

EXAMPLE = """example:
  python tools/merge_datasets.py --input shards/a_text_document shards/b_text_document \\
      --output-prefix data/corpus_text_document
"""


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="prefixes, with or without .bin or .idx, joined in this order; or folders: "
        "all their shards, sorted by name",
    )
    p.add_argument("--output-prefix", required=True, help="the folder is created")
    p.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    return p.parse_args()


def shards(inputs: Sequence[str]) -> list[str]:
    """The prefixes that the inputs name.

    Raises:
        ConfigError: a folder has none.
    """
    prefixes = []
    for name in inputs:
        if Path(name).is_dir():
            found = sorted(str(path.with_suffix("")) for path in Path(name).glob("*.idx"))
            if not found:
                raise ConfigError(f"--input {name}: the folder has no .idx file")
            prefixes += found
        else:
            prefixes.append(name.removesuffix(".bin").removesuffix(".idx"))
    return prefixes


@command
def main() -> None:
    flags = parse()
    from pose_megatron.preprocessing.shards import merge

    prefixes, output = shards(flags.input), flags.output_prefix
    size = merge(prefixes, output, flags.overwrite)
    print(
        f"{output}.bin/.idx: {size.documents:,} documents, {size.tokens:,} tokens of "
        f"{len(prefixes)} shards"
    )
