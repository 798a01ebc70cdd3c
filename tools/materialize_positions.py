"""Draws the samples of a run once and writes them to disk; see --help."""

import argparse
import dataclasses
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pose_megatron.runtime.startup import prepare_megatron

prepare_megatron()

from tqdm import tqdm

from pose_megatron.config import arguments
from pose_megatron.data import materialized
from pose_megatron.training.run import assemble


def parse() -> tuple[argparse.Namespace, list[str]]:
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
        type=int,
        help="default: --train-samples, or --train-iters x --global-batch-size",
    )
    return parser.parse_known_args()


def samples_of(flags: argparse.Namespace, args: arguments.Arguments) -> int:
    t = args.training
    if flags.samples is not None:
        samples = flags.samples
    elif t.train_samples:
        samples = t.train_samples
    elif t.train_iters and t.global_batch_size:
        samples = t.train_iters * t.global_batch_size  # more than a ramped batch needs
    else:
        raise ValueError(
            "--samples is missing: give it, or --train-samples, or --train-iters and "
            "--global-batch-size"
        )
    if samples < 1:
        raise ValueError(f"--samples must be at least 1, not {samples}")
    return samples


def main() -> None:
    flags, argv = parse()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("pose_megatron").setLevel(logging.INFO)
    try:
        args = arguments.parse(argv, trains=False)
        if args.data.materialized:
            raise ValueError("--materialized names such files; this program writes them")
        samples = samples_of(flags, args)
        run = assemble(args)
        config, sampler = run.model, run.sampler
        data = run.datasets(samples).train
        description = {
            "window": sampler.window,
            "target": sampler.target,
            "samples": samples,
            "vocab_size": config.vocab_size,
            "positions": dataclasses.asdict(args.position),
            "law": sampler.describe(),
            "sampler": dataclasses.asdict(sampler),
            "data": dataclasses.asdict(args.data),
        }
        with tqdm(total=samples, unit=" samples", disable=not sys.stderr.isatty()) as bar:

            def drawn():
                for i in range(samples):
                    yield data[i]
                    bar.update()

            materialized.write(flags.output, drawn(), config.vocab_size, description)
    except (ValueError, OSError) as error:
        sys.exit(f"materialize_positions.py: error: {error}")
    size = sum(os.path.getsize(f"{flags.output}_{part}.bin") for part in materialized.PARTS)
    print(
        f"{samples} samples of {sampler.window} tokens, {size / 1e6:,.1f} MB: {flags.output}_"
        f"{{{','.join(materialized.PARTS)}}}.bin/.idx, {flags.output}.json"
    )


if __name__ == "__main__":
    sys.exit(main())
