"""Samples on disk: those of one run, in its order, for any trainer to read.

    prefix_tokens.bin/.idx      sequence i: the L input tokens of sample i
    prefix_labels.bin/.idx      each token's true next token, also at a chunk's end
    prefix_positions.bin/.idx   position ids in [0, T), int32
    prefix.json                 describes them; written last, so where it is, they are whole

The three pairs are Megatron's indexed format: megatron-core's IndexedDataset reads them, and so
does `numpy.memmap` with shape (samples, L), since every sequence has L values.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from pose_megatron.data.indexed_corpus import IndexedCorpus
from pose_megatron.errors import ConfigError, flag_name
from pose_megatron.preprocessing.indexed_writer import (
    PARTS_OF_SAMPLES,
    IndexedWriter,
    digests,
    token_dtype,
)
from pose_megatron.runtime.atomic_files import staged_files
from pose_megatron.runtime.json_files import read_json

PARTS = dict(zip(PARTS_OF_SAMPLES, ("tokens", "labels", "position_ids"), strict=True))
ONE = np.array([1])  # each sample is a document of one sequence


def write(
    prefix: str,
    samples: Iterable[dict[str, np.ndarray]],
    vocab_size: int,
    description: dict,
    overwrite: bool = False,
) -> None:
    """Writes the files; until the new ones are whole, those that they replace stay.

    Args:
        samples: a PoseDataset's samples.
        description: window, target, samples, law (in words), positions (the flags), and whatever
            else a reader should know.
        overwrite: whether existing files may be replaced.

    Raises:
        ConfigError: files exist, or another job writes them.
        OSError: the disk is full, or the folder cannot be written.
    """
    name = Path(prefix).name
    pairs = {part: f"{name}_{part}" for part in PARTS}
    files = [f"{pair}{suffix}" for pair in pairs.values() for suffix in (".bin", ".idx")]
    files.append(f"{name}.json")
    with staged_files(prefix, f"--output {prefix}", files, overwrite) as draft:
        dtypes = dict.fromkeys(PARTS, token_dtype(vocab_size)) | {"positions": np.int32}
        writers = {part: IndexedWriter(draft, pairs[part], dtypes[part]) for part in PARTS}
        try:
            for sample in samples:
                for part, field in PARTS.items():
                    writers[part].append(sample[field], np.array([sample[field].size]), ONE)
            for writer in writers.values():
                writer.finish()
        finally:
            for writer in writers.values():
                writer.close()
        crc32: dict[str, str] = {}
        for part, writer in writers.items():
            crc32 |= digests(pairs[part], writer.size)
        text = json.dumps(description | {"crc32": crc32}, indent=1)
        (draft / f"{name}.json").write_text(text, encoding="utf-8")


class MaterializedDataset(torch.utils.data.Dataset):
    """Reads the files: sample i is what the run that wrote them would have drawn.

    Args:
        prefix: --materialized.
        window, target: the run's L and T.
        samples: how many the run needs.
        vocab_size, positions_only: see PoseDataset.
        position_flags: the run's, by name; they must be those that the files were written with.

    Raises:
        ConfigError: files are missing, damaged, of another run or too few.
    """

    def __init__(
        self,
        prefix: str,
        window: int,
        target: int,
        samples: int,
        vocab_size: int,
        position_flags: dict,
        positions_only: bool = False,
    ):
        self.prefix, self.vocab_size, self.positions_only = prefix, vocab_size, positions_only
        self.samples, self.target = samples, target
        description = read_description(prefix)
        for flag, mine, theirs in (
            ("--seq-length", window, description["window"]),
            *(
                (flag_name(name), value, description["positions"].get(name))
                for name, value in position_flags.items()
            ),
        ):
            if mine != theirs:
                raise ConfigError(
                    f"{flag} {mine}: --materialized {prefix} was written with "
                    f"{theirs}; leave the flag out or write it again"
                )
        if description["target"] > target:
            raise ConfigError(
                f"--max-position-embeddings {target}: the positions of --materialized {prefix} "
                f"reach up to {description['target']}; raise it, or write them again"
            )
        if description["samples"] < samples:
            raise ConfigError(
                f"--materialized {prefix} holds {description['samples']} samples, the run needs "
                f"{samples}: write more, or lower --train-iters"
            )
        self.parts = {part: IndexedCorpus(f"{prefix}_{part}", "--materialized") for part in PARTS}
        for part, corpus in self.parts.items():
            if len(corpus.lengths) != description["samples"] or (corpus.lengths != window).any():
                raise ConfigError(
                    f"--materialized {prefix}: {prefix}_{part}.idx does not hold the samples that "
                    f"{prefix}.json describes; write them again"
                )

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        def read(part: str) -> np.ndarray:
            return self.parts[part].tokens.get(index).astype(np.int64)

        positions = read("positions")
        self._check("position", positions, index, self.target, "--max-position-embeddings")
        if self.positions_only:
            return {"position_ids": positions}
        tokens, labels = read("tokens"), read("labels")
        for ids in (tokens, labels):
            self._check("token id", ids, index, self.vocab_size, "the vocabulary")
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": np.ones(len(tokens), np.float32),
            "position_ids": positions,
        }

    def _check(self, what: str, values: np.ndarray, index: int, end: int, of: str) -> None:
        lowest, highest = int(values.min()), int(values.max())
        if lowest < 0 or highest >= end:
            raise ConfigError(
                f"--materialized {self.prefix}: {what} {lowest if lowest < 0 else highest} in "
                f"sample {index} is outside {of} of {end}; write the files again"
            )

    def name(self, index: int) -> str:
        """Where a sample comes from, in words for a person."""
        return f"sample {index} of {self.prefix}"


def read_description(prefix: str) -> dict:
    """The content of prefix.json.

    Raises:
        ConfigError: it is missing, or not what this module writes.
    """
    path = Path(f"{prefix}.json")
    if not path.is_file():
        raise ConfigError(
            f"--materialized {prefix}: {path} is missing, so the files were never finished; run "
            "tools/materialize_positions.py (again)"
        )
    try:
        description = read_json(path)
        for name in ("window", "target", "samples"):
            if type(description[name]) is not int or description[name] < 1:
                raise ValueError(name)
        if type(description["positions"]) is not dict or type(description["law"]) is not str:
            raise ValueError("positions or law")
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--materialized {prefix}: {path} is not what tools/materialize_positions.py writes"
        ) from None
    return description
