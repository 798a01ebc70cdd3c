"""Says what a checkpoint is (Hugging Face's, Meta's or Megatron's) without loading its tensors.

Of token files it says the counts, reads all of them, and compares them with the digests that
preprocess, merge and materialize left beside them.
"""

import argparse
import glob
import json
import sys
from pathlib import Path

from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing.indexed_writer import (
    PARTS_OF_SAMPLES,
    IndexedReader,
    check_digests,
)
from pose_megatron.runtime.cli import command
from pose_megatron.runtime.ranges import whole

EXAMPLES = """examples:
  # shape, parameters, dtype, rope and training progress
  python tools/checkpoint/checkpoint_inspector.py checkpoints/llama-2-7b-pose-128k

  # whether a corpus, or the samples of materialize, are as they were written
  pose-megatron inspect data/books_text_document books_pose

  # what an export changed; exit code 1 if anything differs
  python tools/checkpoint/checkpoint_inspector.py --diff --values checkpoints/pose models/pose
"""


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "checkpoints",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="a checkpoint, or one iteration of it; or the prefix of token files or samples",
    )
    p.add_argument(
        "--iteration",
        type=whole(0),
        help="the one of a Megatron checkpoint to look at [the latest]",
    )
    p.add_argument(
        "--diff",
        action="store_true",
        help="compare two: config, and names, shapes and dtypes of tensors",
    )
    p.add_argument(
        "--values",
        action="store_true",
        help="with --diff: read every tensor and give the largest absolute difference",
    )
    p.add_argument(
        "--verify",
        action="store_true",
        help="read everything, and compare it with the checksums that torch.save left "
        "(safetensors have none)",
    )
    p.add_argument("--json", action="store_true", help="print JSON instead")
    args = p.parse_args()
    if args.diff and len(args.checkpoints) != 2:
        p.error(f"--diff compares two folders, not {len(args.checkpoints)}")
    if args.values and not args.diff:
        p.error("--values needs --diff")
    return args


@command
def main() -> None:
    args = parse()
    prefixes = [token_files(path) for path in args.checkpoints]
    if all(prefixes) and not args.diff:
        inspect_token_files([name for names in prefixes for name in names], args.json)
        return
    if any(prefixes):
        raise ConfigError(
            f"{next(names[0] for names in prefixes if names)}.idx: token files are not compared, "
            "and are inspected apart from checkpoints"
        )
    from pose_megatron.checkpoints.summary import compare, summarise

    summaries = [summarise(path, args.iteration) for path in args.checkpoints]
    if args.verify:
        for summary in summaries:
            summary.reader.weights.verify()
    if not args.diff:
        if args.json:
            found = [summary.to_dict() for summary in summaries]
            print(json.dumps(found[0] if len(found) == 1 else found, indent=2))
        else:
            print("\n\n".join(map(str, summaries)))
        return
    one, other = summaries
    differences = compare(one, other, args.values)
    if args.json:
        print(json.dumps(differences, indent=2))
    else:
        print_differences(differences, args.checkpoints)
    sys.exit(1 if differences else 0)


def token_files(path: Path) -> list[str]:
    """Prefixes of the token files that a path stands for: those of its name, with or without .bin
    or .idx, or all that preprocess or materialize made of it, also where a file of them is missing;
    none if it is a folder."""
    if path.is_dir():
        return []
    prefix = str(path).removesuffix(".bin").removesuffix(".idx")
    if Path(f"{prefix}.idx").is_file():
        return [prefix]
    name = glob.escape(Path(prefix).name)
    found = {
        str(file.with_suffix(""))
        for suffix in (".bin", ".idx")
        for file in path.parent.glob(f"{name}_*{suffix}")
    }
    samples = {f"{prefix}_{part}" for part in PARTS_OF_SAMPLES}
    return sorted(found | samples if found & samples else found)


def inspect_token_files(prefixes: list[str], as_json: bool) -> None:
    """Counts of token files, and whether they are what was written."""
    rows = []
    for prefix in prefixes:
        reader = IndexedReader(prefix)
        reader.check_tokens()
        counts = {"documents": reader.size.documents, "tokens": reader.size.tokens}
        kind = {"prefix": prefix, "dtype": str(reader.dtype)}
        rows.append(kind | counts | {"as_written": check_digests(prefix) or None})
    if as_json:
        print(json.dumps(rows[0] if len(rows) == 1 else rows, indent=2))
        return
    for row in rows:
        known = "as written" if row["as_written"] else "no digests beside them"
        print(
            f"{row['prefix']}.bin/.idx: {row['documents']:,} documents, {row['tokens']:,} tokens, "
            f"{row['dtype']}; {known}"
        )


def print_differences(differences: dict, paths: list[Path]) -> None:
    print(f"one    {paths[0]}\nother  {paths[1]}")
    if not differences:
        print("no difference")
    for what, names in differences.items():
        print(f"{what}: {len(names)}")
        for name, value in list(names.items())[:20]:
            shown = (
                f"{value:.3e}"
                if isinstance(value, float)
                else (f"{value[0]} | {value[1]}" if isinstance(value, list) else value)
            )
            print(f"  {name}: {shown}")
        if len(names) > 20:
            print(f"  ... and {len(names) - 20} more")
    if values := differences.get("values"):
        print(f"largest difference: {max(values.values()):.3e}")
