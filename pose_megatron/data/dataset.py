"""Skip-wise samples over Megatron's indexed, memory-mapped corpora.

    prefix.bin/.idx ─► Spans: the sample's Source, a stretch of the corpus; nothing is read
                    ─► Blend, when there are several corpora (megatron-core's order)
                    ─► PoseDataset: the sample's plan, then exactly the tokens that it names

Order and plans depend on the seed and the sample's index alone: not on ranks, workers, restarts or
the number of samples asked for. A sample reads L + N tokens.
"""

import logging
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pose_megatron.config.arguments import check_split
from pose_megatron.config.flags import DataFlags
from pose_megatron.data.blend import SPLITS, BlendBuilder, blends, flag_of_blend
from pose_megatron.data.epochs import readings
from pose_megatron.data.materialized import MaterializedDataset
from pose_megatron.data.source import Source
from pose_megatron.data.spans import DocumentSpans, PackedSpans, PoseDatasetConfig
from pose_megatron.errors import ConfigError
from pose_megatron.positions.sampler import PoseSampler
from pose_megatron.runtime.ranks import rank

logger = logging.getLogger(__name__)
DEFAULT_SPLIT = "969,30,1"  # Megatron-LM's


class PoseDataset(torch.utils.data.Dataset):
    """Samples with skip-wise positions, over a dataset of sources.

    `dataset[i]` holds [L] arrays, typed as megatron-core's GPTDataset's: int64 `tokens`, `labels`
    (each token's true next one) and `position_ids` in [0, T), and a float32 `loss_mask` of ones.

    Args:
        sources: items {"source": Source}. The index is the sample's identity: sample i has the plan
            of (sampler.seed, i), whichever corpus of a blend it comes from.
        sampler: draws the plans.
        vocab_size: token ids must lie below it.
        positions_only: samples hold `position_ids` only, which is all that a middle pipeline stage
            needs; no token is read then, unless the sampler reads tokens.

    Raises:
        ConfigError: a sample has a token id outside the vocabulary; names corpus and document.
    """

    def __init__(
        self, sources, sampler: PoseSampler, vocab_size: int, positions_only: bool = False
    ):
        self.sources = sources
        self.sampler = sampler
        self.vocab_size = vocab_size
        self.positions_only = positions_only

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        source: Source = self.sources[index]["source"]
        window = source.tokens(0, self.sampler.window) if self.sampler.reads_tokens else None
        plan = self.sampler.plan(index, source.length, tokens=window)
        positions = plan.positions()
        if self.positions_only:
            return {"position_ids": positions}
        rows = source.read(plan)
        lowest, highest = int(rows.min()), int(rows.max())
        if lowest < 0 or highest >= self.vocab_size:
            documents = sorted({document for document, _, _ in source.pieces})
            wrong = lowest if lowest < 0 else highest
            raise ConfigError(
                f"{source.corpus.flag} {source.corpus.prefix}: token id {wrong} in document "
                f"{documents[0]} is outside the vocabulary of {self.vocab_size}; the corpus was "
                "made with another tokenizer"
            )
        return {
            "tokens": rows[0],
            "labels": rows[1],
            "loss_mask": np.ones(len(positions), np.float32),
            "position_ids": positions,
        }

    def name(self, index: int) -> str:
        """Where a sample comes from, in words for a person."""
        source = self.sources[index]["source"]
        document, first, _ = source.pieces[0]
        return f"sample {index}: {source.corpus.prefix}, document {document} from token {first}"


TrainingSet = PoseDataset | MaterializedDataset


class Datasets(NamedTuple):
    """The three splits; None where no samples are needed, or where this rank does not load."""

    train: TrainingSet | None
    valid: PoseDataset | None
    test: PoseDataset | None


def build_datasets(
    data: DataFlags,
    sampler: PoseSampler,
    vocab_size: int,
    train_samples: int,
    valid_samples: int,
    positions_only: bool = False,
    test_samples: int = 0,
    materialized_as: dict | None = None,
) -> Datasets:
    """Training samples by `sampler`, validation and test samples with plain positions.

    Every rank calls it (megatron-core's builder has barriers); only tensor-parallel rank 0 of a
    stage gets datasets, the others None.

    Args:
        train_samples, valid_samples, test_samples: how many the run needs.
        positions_only: see PoseDataset.
        materialized_as: with --materialized, whose training samples are those on disk: the run's
            position flags, which the files must have been written with.

    Raises:
        ConfigError: flags, a corpus or a split that cannot be used; says which, and the way out.
    """
    reads = not dist.is_initialized() or parallel_state.get_tensor_model_parallel_rank() == 0
    train = None
    if data.materialized and reads:
        train = MaterializedDataset(
            data.materialized,
            sampler.window,
            sampler.target,
            train_samples,
            vocab_size,
            materialized_as or {},
            positions_only,
        )
    sizes = [0 if data.materialized else train_samples, valid_samples, test_samples]
    if not any(sizes):
        return Datasets(train, None, None)
    built = BlendBuilder(
        DocumentSpans if data.data_mode == "document" else PackedSpans,
        sizes,
        lambda: reads,
        _config(data, sampler, sizes),
    ).build()
    if not reads:
        return Datasets(None, None, None)
    if rank() == 0:
        for split, sources in zip(SPLITS, built, strict=True):
            for reading in readings(split, sources):
                logger.log(logging.WARNING if reading.is_many else logging.INFO, "%s", reading)
    plain = PoseSampler(sampler.window, sampler.window, "full", seed=sampler.seed)
    drawn = Datasets(
        *(
            None if sources is None else PoseDataset(sources, law, vocab_size, positions_only)
            for sources, law in zip(built, (sampler, plain, plain), strict=True)
        )
    )
    return drawn._replace(train=train) if data.materialized else drawn


def _config(data: DataFlags, sampler: PoseSampler, sizes: list[int]) -> PoseDatasetConfig:
    """megatron-core's settings of the three splits; a split that needs no samples is left out."""
    blend, per_split = blends(data)
    share = check_split(DEFAULT_SPLIT if data.split is None else data.split)
    named = [(flag_of_blend(data), blend)]
    named += [
        (f"--{name}-data-path", own) for name, own in zip(SPLITS, per_split or [], strict=False)
    ]
    config = PoseDatasetConfig(
        random_seed=sampler.seed,
        sequence_length=data.seq_length,
        blend=blend,
        blend_per_split=per_split,
        split=share if blend else None,
        path_to_cache=data.data_cache_path,
        short_documents=data.short_documents,
        packed_reach=sampler.target if data.packed_skips == "stream" else 0,
        named_by={prefix: flag for flag, own in named if own for prefix in own[0]},
    )
    parts = config.split_matrix if blend else config.blend_per_split
    for i, (name, size) in enumerate(zip(SPLITS, sizes, strict=True)):
        if size and parts[i] is None:
            raise ConfigError(
                f"--split {share} leaves no {name} documents"
                if blend
                else f"--{name}-data-path is missing: {size} {name} samples are needed"
            )
        if not size:
            parts[i] = None
    return config
