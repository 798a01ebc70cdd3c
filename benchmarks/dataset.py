"""Speed of the datasets and of the position sampler, ours and theirs in one run; see --help.

Measured on a corpus of random tokens, mapped from disk and read once before the clock runs:

    samples/s   one process, indices in order: megatron-core's GPTDataset, our dataset with plain
                positions (`full`) and with PoSE positions; samples as the training loop gets them
    plans/s     the PoSE authors' rule (three draws of `random`, torch.arange, the second chunk
                shifted), and our sampler: one plan at a time and in batches, with positions and
                without
    start       seconds from opening a corpus of many documents to its first sample
"""

import argparse
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pose_megatron.runtime.startup import prepare_megatron

prepare_megatron()

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import _IndexWriter

from pose_megatron.config.flags import DataFlags
from pose_megatron.data.dataset import build_datasets
from pose_megatron.positions.sampler import PoseSampler
from pose_megatron.runtime import distributed

VOCABULARY = 32000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[2],
        epilog="example:\n  python benchmarks/dataset.py --output dataset.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--window", type=int, default=2048, help="L, tokens")
    parser.add_argument("--target", type=int, default=131072, help="T, tokens")
    parser.add_argument("--documents", type=int, default=2000, help="for samples/s")
    parser.add_argument("--document-tokens", type=int, default=20000, help="mean of their lengths")
    parser.add_argument("--many-documents", type=int, default=1_000_000, help="for the start")
    parser.add_argument("--samples", type=int, default=10000, help="read in one timing")
    parser.add_argument("--repeats", type=int, default=7, help="timings; the median counts")
    parser.add_argument("--output", help="write the figures here as JSON")
    return parser.parse_args()


def write_corpus(prefix: Path, lengths: np.ndarray) -> str:
    """Random tokens, indexed by megatron-core's index writer: quicker than its builder."""
    rng = np.random.default_rng(0)
    rng.integers(0, VOCABULARY, lengths.sum(), dtype=np.uint16).tofile(f"{prefix}.bin")
    with _IndexWriter(f"{prefix}.idx", np.uint16) as writer:
        writer.write(lengths.tolist(), None, range(len(lengths) + 1))
    return str(prefix)


class TinyTokenizer:
    """The little that GPTDatasetConfig needs of a tokenizer."""

    vocab_size, eod, pad = VOCABULARY, 0, -1
    special_tokens_dict: dict = {}  # noqa: RUF012
    unique_identifiers: dict = {}  # noqa: RUF012


def stock(prefix: str, window: int, samples: int):
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=window,
        blend=([prefix], None),
        split="1,0,0",
        tokenizer=TinyTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[
        0
    ]


def ours(prefix: str, window: int, target: int, samples: int, name: str, **data):
    flags = DataFlags(data_path=[prefix], split="1,0,0", seq_length=window, **data)
    return build_datasets(flags, PoseSampler(window, target, name), VOCABULARY, samples, 0).train


def authors_rule(window: int, target: int, source: int) -> torch.Tensor:
    first = random.randint(1, (window + 1) // 2)
    random.randint(window, source)
    positions = torch.arange(window, dtype=torch.long)
    skip = random.randint(0, target - window)
    positions[:first] += 0
    positions[first:] += skip
    return positions


def rates(cases: dict[str, tuple[Callable[[], None], int]], repeats: int) -> dict[str, float]:
    """{name: things per second}; the cases take turns, so that a busy moment hits them all.

    Args:
        cases: by name, what to time and how many things it makes.
    """
    seconds = {name: [] for name in cases}
    for turn in range(repeats + 1):  # the first warms up
        for name, (run, _) in cases.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: count / statistics.median(seconds[name]) for name, (_, count) in cases.items()}


def start_up(prefix: str, window: int, target: int) -> dict[str, float]:
    """Seconds to the first sample, by data mode and state of the cache."""
    figures = {}
    for mode in ("document", "packed"):
        with tempfile.TemporaryDirectory() as cache:
            for name, folder in (
                ("no cache", None),
                ("filling the cache", cache),
                ("from the cache", cache),
            ):
                start = time.perf_counter()
                data = ours(
                    prefix,
                    window,
                    target,
                    10**6,
                    "pose",
                    data_mode=mode,
                    data_cache_path=folder,
                    short_documents="pack",
                )
                data[0]
                figures[f"{mode}, {name}"] = time.perf_counter() - start
    start = time.perf_counter()
    stock(prefix, window, 10**6)[0]
    figures["megatron-core GPTDataset, no cache"] = time.perf_counter() - start
    return figures


def main() -> None:
    flags = parse()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    distributed.initialize(seed=1)
    n, window, target = flags.samples, flags.window, flags.target
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        lengths = rng.integers(1, 2 * flags.document_tokens, flags.documents)
        prefix = write_corpus(Path(folder) / "long", lengths)
        np.fromfile(f"{prefix}.bin", np.uint16).max()  # into the page cache
        sets = {
            "megatron-core GPTDataset": stock(prefix, window, n),
            "plain": ours(prefix, window, target, n, "full"),
            "PoSE, documents": ours(prefix, window, target, n, "pose"),
            "PoSE, packed": ours(prefix, window, target, n, "pose", data_mode="packed"),
        }

        def read(data):
            for i in range(n):
                data[i]

        samples = rates(
            {name: (lambda data=data: read(data), n) for name, data in sets.items()}, flags.repeats
        )
        many = write_corpus(Path(folder) / "many", rng.integers(1, 200, flags.many_documents))
        starts = start_up(many, window, target)

    sampler, batch, source = PoseSampler(window, target), 4096, 5 * window
    small = batch // 16  # positions of 4,096 samples would be 64 MiB

    def each(one: Callable[[int], object]) -> tuple[Callable[[], None], int]:
        def run():
            for i in range(n):
                one(i)

        return run, n

    plans = rates(
        {
            "the authors' rule": each(lambda i: authors_rule(window, target, source)),
            "one at a time": each(lambda i: sampler.plan(i, source)),
            "one at a time, positions": each(lambda i: sampler.plan(i, source).positions()),
            "batches of 4096": (lambda: sampler.plans(range(batch), source), batch),
            "batches of 256, positions": (
                lambda: sampler.plans(range(small), source).positions(),
                small,
            ),
        },
        flags.repeats,
    )

    for title, figures, base in (
        ("samples/s", samples, "megatron-core GPTDataset"),
        ("plans/s", plans, "the authors' rule"),
    ):
        print(f"{title}, L = {window}, T = {target}, one thread")
        for name, figure in figures.items():
            print(f"  {name:38s} {figure:12,.0f}  {figure / figures[base]:8.2f} x")
    print(f"start, {flags.many_documents:,} documents")
    for name, figure in starts.items():
        print(f"  {name:38s} {figure:12.2f} s")
    if flags.output:
        Path(flags.output).write_text(
            json.dumps(
                {
                    "window": window,
                    "target": target,
                    "samples_per_second": samples,
                    "plans_per_second": plans,
                    "start_seconds": starts,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
