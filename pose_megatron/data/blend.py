"""Several corpora as one stream of samples: how users write a blend, and the order of its samples.

The order is megatron-core's greedy one: sample i comes from the corpus that lags furthest behind
its share of the first i samples. It depends on the weights and on the samples before it, not on how
many follow, so a longer run continues a shorter one.
"""

import math
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.utils import normalize

from pose_megatron.config.flags import DataFlags
from pose_megatron.data.index_cache import cached
from pose_megatron.errors import ConfigError

SPLITS = ("train", "valid", "test")


class Blend(torch.utils.data.Dataset):
    """Samples of several datasets, mixed by weight.

    megatron-core's BlendedDataset with two differences: two jobs may fill the index cache of its
    table at once, and no corpus runs out: the datasets here repeat for as many epochs as needed.

    Args:
        datasets: at most 32,767; each takes any index.
        weights: positive; their sum does not matter.
        size: number of samples.
        cache: folder for the table; None keeps it in memory, 10 bytes per sample.
    """

    def __init__(self, datasets: list, weights: list[float], size: int, cache: str | None):
        self.datasets, self.size = datasets, size
        weights = normalize(weights)
        identity = {"table": "blend", "weights": weights, "size": size}
        table = cached(cache, identity, lambda: _greedy(weights, size))
        self.which, self.index_there = table["which"], table["index_there"]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        return self.datasets[self.which[index]][self.index_there[index]]

    def samples_of_each(self) -> np.ndarray:
        """How many of the samples each dataset gives, int64."""
        count, block = np.zeros(len(self.datasets), np.int64), 1 << 24  # the table may be mapped
        for start in range(0, self.size, block):
            which = self.which[start : start + block]
            count += np.bincount(which, minlength=len(self.datasets))
        return count


def _greedy(weights: list[float], size: int) -> dict[str, np.ndarray]:
    which, index_there = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(which, index_there, weights, len(weights), size, False)
    return {"which": which, "index_there": index_there}


class BlendBuilder(BlendedMegatronDatasetBuilder):
    """megatron-core's builder: its splits, ranks and barriers, with our Blend where it blends."""

    def build_generic_dataset(self, cls, is_built_on_rank, synchronize_ranks, *args):
        if cls is not BlendedDataset:
            return super().build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args)

        def blend(datasets, weights, size, config):
            # Without weights megatron-core would end after one epoch; here `sizes` rules.
            split = datasets[0].index_split
            return Blend(datasets, weights, self.sizes[split.value], config.path_to_cache)

        return super().build_generic_dataset(blend, is_built_on_rank, synchronize_ranks, *args)


Prefixes = tuple[list[str], list[float] | None]  # of the corpora, and their weights


def blends(data: DataFlags) -> tuple[Prefixes | None, list[Prefixes | None] | None]:
    """(the blend that --split divides, None), or (None, each split's own blend or None).

    Raises:
        ConfigError: flags that contradict each other, or name no corpus.
    """
    per_split = [data.train_data_path, data.valid_data_path, data.test_data_path]
    given = [
        flag
        for flag, words in (
            ("--data-path", data.data_path),
            ("--data-args-path", data.data_args_path),
            ("--train-data-path, --valid-data-path or --test-data-path", any(per_split)),
        )
        if words
    ]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} both name the corpora; keep one")
    if any(per_split):
        if data.split is not None:
            raise ConfigError(
                f"--split {data.split} has no meaning where each split has a path of "
                "its own; leave it out"
            )
        return None, [
            parse_blend(words, f"--{name}-data-path") if words else None
            for name, words in zip(SPLITS, per_split, strict=True)
        ]
    if data.data_args_path:
        file = Path(data.data_args_path)
        if not file.is_file():
            raise ConfigError(f"--data-args-path {file}: no such file")
        return parse_blend(
            file.read_text(encoding="utf-8").split(), f"--data-args-path {file}"
        ), None
    return parse_blend(data.data_path, "--data-path"), None


def parse_blend(words: list[str], flag: str) -> Prefixes:
    """Prefixes and weights of 'prefix prefix ...' or 'weight prefix weight prefix ...'.

    Raises:
        ConfigError: no words, or a weight that cannot be.
    """
    if not words:
        raise ConfigError(f"{flag} is missing: name the corpus that preprocess_data.py wrote")
    try:
        weights = [float(word) for word in words[::2]]
    except ValueError:
        return words, None
    prefixes = words[1::2]
    if len(prefixes) != len(weights) or not prefixes:
        raise ConfigError(f"{flag} {' '.join(words)}: give 'weight prefix weight prefix ...'")
    for weight in weights:
        if not 0 < weight < math.inf:
            raise ConfigError(f"{flag}: weight {weight} must be positive and finite")
    return prefixes, weights
