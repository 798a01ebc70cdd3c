"""A PoSE corpus on disk: the samples of a run, in its order, for any trainer to read.

    prefix_tokens.bin/.idx      sequence i: the L input tokens of sample i
    prefix_labels.bin/.idx      each one's true next token, also at a chunk's end
    prefix_positions.bin/.idx   position ids in [0, T), int32
    prefix.json                 what they are; written last, so that it says they are whole

The three pairs are Megatron's indexed format: megatron-core's IndexedDataset reads them, and so
does `numpy.memmap` with shape (samples, L), since every sequence has L values.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from pose_megatron.data.indexed_corpus import Corpus
from pose_megatron.errors import ConfigError
from pose_megatron.runtime.atomic_files import fsync, write_atomically

PARTS = {"tokens": "tokens", "labels": "labels", "positions": "position_ids"}


def write(
    prefix: str, samples: Iterable[dict[str, np.ndarray]], vocab_size: int, description: dict
) -> None:
    """Writes the files, or none that counts as whole.

    Args:
        samples: as a PoseDataset yields them.
        description: window, target, samples, law (in words), positions (the flags), and whatever
            else the reader should know.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    whole = Path(f"{prefix}.json")
    whole.parent.mkdir(parents=True, exist_ok=True)
    whole.unlink(missing_ok=True)
    drafts = {part: Path(f"{prefix}_{part}.tmp") for part in PARTS}
    dtypes = dict.fromkeys(PARTS, DType.optimal_dtype(vocab_size)) | {"positions": np.int32}
    try:
        builders = {
            part: IndexedDatasetBuilder(f"{path}.bin", dtype=dtypes[part])
            for part, path in drafts.items()
        }
        for sample in samples:
            for part, name in PARTS.items():
                values = torch.from_numpy(sample[name])
                builders[part].add_document(values, [len(values)])
        for part, draft in drafts.items():
            builders[part].finalize(f"{draft}.idx")
            for ending in ("bin", "idx"):
                fsync(Path(f"{draft}.{ending}"))
                Path(f"{draft}.{ending}").replace(f"{prefix}_{part}.{ending}")
    finally:
        for draft in drafts.values():
            for ending in ("bin", "idx"):
                Path(f"{draft}.{ending}").unlink(missing_ok=True)
    write_atomically(whole, json.dumps(description, indent=1))


class MaterializedDataset(torch.utils.data.Dataset):
    """Reads them back: sample i is what the run that wrote them would have drawn.

    Args:
        prefix: --materialized.
        window: L. target: T. samples: how many the run needs.
        vocab_size, positions_only: as of PoseDataset.
        asked: what the run says of the positions, to be compared with what the files have.

    Raises:
        ConfigError: files are missing, damaged or of another run, or too few.
    """

    def __init__(
        self,
        prefix: str,
        window: int,
        target: int,
        samples: int,
        vocab_size: int,
        asked: dict,
        positions_only: bool = False,
    ):
        self.prefix, self.vocab_size, self.positions_only = prefix, vocab_size, positions_only
        self.samples = samples
        description = read_description(prefix)
        for flag, mine, theirs in (
            ("--seq-length", window, description["window"]),
            *(
                (f"--{name.replace('_', '-')}", value, description["positions"].get(name))
                for name, value in asked.items()
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
        self.parts = {part: Corpus(f"{prefix}_{part}", "--materialized") for part in PARTS}
        for part, corpus in self.parts.items():
            if len(corpus.lengths) != description["samples"] or (corpus.lengths != window).any():
                raise ConfigError(
                    f"--materialized {prefix}: {prefix}_{part}.idx is not of the run that "
                    f"{prefix}.json describes; write them again"
                )

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        def read(part: str) -> np.ndarray:
            return self.parts[part].tokens.get(index).astype(np.int64)

        if self.positions_only:
            return {"position_ids": read("positions")}
        tokens, labels = read("tokens"), read("labels")
        highest = max(int(tokens.max()), int(labels.max()))
        if highest >= self.vocab_size:
            raise ConfigError(
                f"--materialized {self.prefix}: token id {highest} in sample {index} is outside "
                f"the vocabulary of {self.vocab_size}"
            )
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": np.ones_like(tokens),
            "position_ids": read("positions"),
        }

    def name(self, index: int) -> str:
        """Where a sample comes from, in words for a person."""
        return f"sample {index} of {self.prefix}"


def read_description(prefix: str) -> dict:
    """What prefix.json says.

    Raises:
        ConfigError: it is missing or not ours.
    """
    path = Path(f"{prefix}.json")
    if not path.is_file():
        raise ConfigError(
            f"--materialized {prefix}: {path} is missing, so the files were never finished; run "
            "tools/materialize_positions.py (again)"
        )
    try:
        description = json.loads(path.read_text())
        for name in ("window", "target", "samples"):
            int(description[name])
        dict(description["positions"])
        str(description["law"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--materialized {prefix}: {path} is not what tools/materialize_positions.py writes"
        ) from None
    return description
