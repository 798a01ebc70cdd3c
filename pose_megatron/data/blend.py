"""Several corpora as one stream of samples: how users write a blend, and the order of its samples.

The order is megatron-core's greedy one: sample i comes from the corpus that lags furthest behind
its share of the first i samples. It depends on the weights and on the samples before it, not on how
many follow, so a longer run continues a shorter one.
"""

import math
import re
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
LONGEST_FILE = 1 << 25  # bytes of a --data-args-path
# A word in quotes, a comment, or a plain word; shlex would see a comment in a path with a #.
WORD = re.compile(r"""(["'])(?P<quoted>[^\n]*?)\1(?!\S)|\#.*|(?P<plain>\S+)""")


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
        return parse_blend(_words_of(Path(data.data_args_path)), flag_of_blend(data)), None
    return parse_blend(data.data_path, "--data-path"), None


def flag_of_blend(data: DataFlags) -> str:
    """What named the corpora that --split divides, for messages that go on with one of them."""
    return f"--data-args-path {data.data_args_path}:" if data.data_args_path else "--data-path"


def _words_of(file: Path) -> list[str]:
    """The words of a --data-args-path: apart by blanks and lines, in quotes where they hold blanks;
    what follows a # is a comment.

    Raises:
        ConfigError: there is no such file, it is no text, or names no corpus.
    """
    flag = f"--data-args-path {file}"
    if not file.is_file():
        raise ConfigError(f"{flag}: no such file")
    if file.stat().st_size > LONGEST_FILE:
        raise ConfigError(f"{flag}: too large for a list of corpora; is it one of them?")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag}: not UTF-8 text ({error}); save it as UTF-8") from None
    found = [word["plain"] or word["quoted"] for word in WORD.finditer(text)]
    words = [word for word in found if word]  # a comment is neither
    if not words:
        raise ConfigError(f"{flag}: names no corpus; give what preprocess_data.py wrote")
    return words


def parse_blend(words: list[str], flag: str) -> Prefixes:
    """Prefixes and weights of 'prefix prefix ...' or 'weight prefix weight prefix ...'.

    Args:
        flag: what gave the words, for messages.

    Raises:
        ConfigError: no words, or a weight that cannot be.
    """
    if not words:
        raise ConfigError(f"{flag} is missing: name the corpus that preprocess_data.py wrote")
    numbers = [_number(word) for word in words[::2]]
    weights = [number for number in numbers if number is not None]
    named_so = Path(f"{words[0]}.idx").exists()  # a corpus whose name is a number
    if numbers[0] is None or (named_so and None in numbers):
        return words, None
    if None in numbers:
        raise ConfigError(
            f"{flag} {words[2 * numbers.index(None)]}: stands where a weight is due; give 'weight "
            "prefix weight prefix ...'"
        )
    prefixes = words[1::2]
    if len(prefixes) != len(weights) or not prefixes:
        raise ConfigError(f"{flag} {' '.join(words)}: give 'weight prefix weight prefix ...'")
    for weight in weights:
        if not 0 < weight < math.inf:
            raise ConfigError(
                f"{flag.removesuffix(':')}: weight {weight} must be positive and finite"
            )
    return prefixes, weights


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
