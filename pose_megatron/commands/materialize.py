"""Draws the samples of a run once and writes them to disk, for --materialized or any trainer."""

import argparse
import dataclasses
import logging
import os
import sys
from typing import TYPE_CHECKING

from pose_megatron.config import arguments
from pose_megatron.errors import ConfigError
from pose_megatron.runtime.cli import command, positive
from pose_megatron.runtime.startup import prepare_megatron

if TYPE_CHECKING:  # imported by main(), after the flags are read
    from pose_megatron.config.flags import TrainingFlags
    from pose_megatron.training.run import Run


def parse() -> tuple[argparse.Namespace, list[str]]:
    """This program's own flags, and the flags of the run."""
    parser = argparse.ArgumentParser(
        description="Writes the training samples of a pretrain_pose.py run to disk: tokens, labels "
        "and\nskip-wise position ids as three indexed corpora, for --materialized or any other "
        "trainer.\nGive it the flags of the run; those that do not shape samples have no effect.",
        epilog="example:\n"
        "  python tools/materialize_positions.py --output books_pose \\\n"
        "      --load llama --data-path books_text_document --seq-length 4096 \\\n"
        "      --max-position-embeddings 131072 --train-iters 1000 --global-batch-size 64\n"
        "  torchrun ... pretrain_pose.py <the same flags> --materialized books_pose",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, help="prefix of the files")
    parser.add_argument(
        "--samples",
        type=positive,
        help="default: --train-samples, or --train-iters x --global-batch-size",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing samples")
    return parser.parse_known_args()


def number_of_samples(wanted: int | None, t: "TrainingFlags") -> int:
    """--samples, or as many as the run trains on.

    Raises:
        ConfigError: neither is given.
    """
    if samples := wanted or t.train_samples:
        return samples
    if t.train_iters and t.global_batch_size:
        return t.train_iters * t.global_batch_size  # more than a ramped batch needs
    raise ConfigError(
        "--samples is missing: give it, or --train-samples, or --train-iters and "
        "--global-batch-size"
    )


def describe(run: "Run", samples: int) -> dict:
    """What PREFIX.json says of the samples."""
    return {
        "window": run.sampler.window,
        "target": run.sampler.target,
        "samples": samples,
        "vocab_size": run.model.vocab_size,
        "positions": dataclasses.asdict(run.args.position),
        "law": run.sampler.describe(),
        "sampler": dataclasses.asdict(run.sampler),
        "data": dataclasses.asdict(run.args.data),
    }


@command
def main() -> None:
    flags, argv = parse()
    args = arguments.parse(argv, trains=False)
    if args.data.materialized:
        raise ConfigError("--materialized names such files; this program writes them")
    samples = number_of_samples(flags.samples, args.training)
    prepare_megatron("cpu")
    from tqdm import tqdm

    from pose_megatron.data import materialized
    from pose_megatron.training.run import assemble

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("pose_megatron").setLevel(logging.INFO)
    run = assemble(args)
    data = run.datasets(samples).train
    assert data is not None, "a run of at least one sample has a training set"
    drawn = tqdm(
        (data[i] for i in range(samples)),
        total=samples,
        unit=" samples",
        disable=not sys.stderr.isatty(),
    )
    materialized.write(
        flags.output, drawn, run.model.vocab_size, describe(run, samples), flags.overwrite
    )
    size = sum(os.path.getsize(f"{flags.output}_{part}.bin") for part in materialized.PARTS)
    print(
        f"{samples} samples of {run.sampler.window} tokens, {size / 1e6:,.1f} MB: {flags.output}_"
        f"{{{','.join(materialized.PARTS)}}}.bin/.idx, {flags.output}.json"
    )
