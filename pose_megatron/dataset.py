"""Skip-wise samples over Megatron's indexed, memory-mapped corpora.

    prefix.bin/.idx ─► Spans: which document, from which token on (a Source; nothing read)
                    ─► Blend, when there are several corpora (megatron-core's order)
                    ─► PoseDataset: plan of the sample, then exactly the tokens that it names

`--data-mode document`: a document of n tokens gives (n - 1) // L samples, so that tokens, not
documents, are drawn evenly. Sample w has the document from token w*L on as its source: with
contiguous content each token is seen once per epoch, and with the others the later chunks come from
anywhere further on in the same document.

`--data-mode packed`: Megatron's stream, all documents of the split end to end in an order of their
own every epoch, and a window every L tokens. A text skip never crosses a document: a window that
lies in one document has its rest as source, a window over several is taken as it is, and only
positions skip. `--packed-skips stream` lets the text skip up to T tokens along the stream.

Order and plans depend on the seed and the sample's index alone: not on ranks, workers, restarts or
the number of samples asked for. Cost: 12 bytes per document, shared where --data-cache-path is
given, no table per sample but a blend's; a sample reads L + N tokens.
"""

import logging
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset

from pose_megatron.blend import SPLITS, BlendBuilder, blends
from pose_megatron.corpus import Corpus, Source
from pose_megatron.flags import DataFlags
from pose_megatron.index_cache import cached
from pose_megatron.materialized import MaterializedDataset
from pose_megatron.positions import PoseSampler
from pose_megatron.shuffle import Shuffle

logger = logging.getLogger(__name__)
SAMPLES, DOCUMENTS = range(2)  # streams of the shuffles


@dataclass
class PoseDatasetConfig(BlendedMegatronDatasetConfig):
    """megatron-core's dataset settings and ours.

    Attributes:
        short_documents: `drop` documents below L + 1 tokens, or `pack` them end to end.
        packed_reach: in packed mode, tokens of stream that a source may have; 0 keeps text skips
            inside a document.
    """

    short_documents: str = "drop"
    packed_reach: int = 0


class Spans(MegatronDataset):
    """The sources of one split of one corpus, in a fresh order every epoch.

    `dataset[i]` is {"source": Source} for any i >= 0. Its length is the number of samples asked
    for, or without one that of an epoch.

    Attributes:
        samples_per_epoch: at least 1 where samples are asked for.
    """

    samples_per_epoch: int

    def __init__(self, dataset, dataset_path, indices, num_samples, index_split, config):
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self.window = config.sequence_length
        self._shuffle: tuple[int, Shuffle | None] = (-1, None)
        self._prepare()
        if not self.samples_per_epoch:
            raise ValueError(self._empty())

    @abstractmethod
    def _prepare(self) -> None:
        """Sets samples_per_epoch."""

    @abstractmethod
    def _source(self, epoch: int, sample: int) -> Source:
        """The source of sample `sample` of the unshuffled epoch."""

    @abstractmethod
    def report(self) -> str:
        """What an epoch has, in one line."""

    @abstractmethod
    def _empty(self) -> str:
        """Why there is no sample, and the way out."""

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Corpus) -> int:
        return len(low_level_dataset.lengths)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: PoseDatasetConfig) -> Corpus:
        return Corpus(dataset_path)

    def __len__(self) -> int:
        return self.samples_per_epoch if self.num_samples is None else self.num_samples

    def __getitem__(self, index: int) -> dict[str, Source]:
        epoch, i = divmod(int(index), self.samples_per_epoch)
        if epoch != self._shuffle[0]:
            n = self.samples_per_epoch
            self._shuffle = epoch, Shuffle(n, self.config.random_seed, epoch, SAMPLES)
        return {"source": self._source(epoch, self._shuffle[1][i])}

    def _cached(self, table: str, build, **identity) -> dict[str, np.ndarray]:
        """`build`'s arrays about this split's documents, through the index cache."""
        documents = [int(self.indices[0]), len(self.indices)] if len(self.indices) else [0, 0]
        identity |= {"table": table, "corpus": self.dataset.identity, "documents": documents}
        return cached(self.config.path_to_cache, identity, build)


class DocumentSpans(Spans):
    """Document mode: each source is a document from some window on.

    Attributes:
        dropped, packed: short documents left out, or laid end to end.
    """

    def _prepare(self) -> None:
        pack = self.config.short_documents == "pack"
        table = self._cached("document spans", lambda: self._table(pack), window=self.window,
                             pack=pack)
        self.documents, self.windows = table["documents"], table["windows"]
        self.stream = Stream(self.dataset, table["short"], table["stream"])
        self.packed = len(table["short"])
        self.dropped = 0 if pack else len(self.indices) - len(self.documents)
        self.from_documents = int(self.windows[-1]) if len(self.windows) else 0
        self.samples_per_epoch = self.from_documents + self.stream.windows(self.window)

    def _table(self, pack: bool) -> dict[str, np.ndarray]:
        lengths = self.dataset.lengths[self.indices]
        long = lengths > self.window
        short = self.indices[~long] if pack else self.indices[:0]
        return {
            "documents": self.indices[long],
            # Samples up to and with each document.
            "windows": np.cumsum((lengths[long] - 1) // self.window, dtype=np.int64),
            "short": short,
            "stream": np.cumsum(self.dataset.lengths[short], dtype=np.int64),
        }

    def _source(self, epoch: int, sample: int) -> Source:
        if sample >= self.from_documents:
            start = (sample - self.from_documents) * self.window
            return self.stream.source(start, self.window + 1)
        at = int(self.windows.searchsorted(sample, side="right"))
        before = int(self.windows[at - 1]) if at else 0
        document, first = int(self.documents[at]), (sample - before) * self.window
        length = int(self.dataset.lengths[document]) - first
        return Source(self.dataset, ((document, first, length),))

    def report(self) -> str:
        return (f"{self.samples_per_epoch} samples per epoch, {self.dropped} short documents "
                f"dropped, {self.packed} packed")

    def _empty(self) -> str:
        longest = int(self.dataset.lengths[self.indices].max()) if len(self.indices) else 0
        return (
            f"--data-path {self.dataset_path}: none of its {len(self.indices)} "
            f"{self.index_split.name} documents fills --seq-length {self.window} + 1 tokens (the "
            f"longest has {longest}); shorten the window, use --short-documents pack or "
            "--data-mode packed, or change --split"
        )


class PackedSpans(Spans):
    """Packed mode: each source starts at a multiple of L of the epoch's stream of documents."""

    def _prepare(self) -> None:
        self.tokens = int(self.dataset.lengths[self.indices].sum(dtype=np.int64))
        self.samples_per_epoch = max(self.tokens - 1, 0) // self.window
        # The first epoch's here and now: loader processes, forked later, share it.
        self._stream = 0, self._stream_of(0)

    def _source(self, epoch: int, sample: int) -> Source:
        if epoch != self._stream[0]:
            self._stream = epoch, self._stream_of(epoch)
        stream, start = self._stream[1], sample * self.window
        if self.config.packed_reach:
            return stream.source(start, min(self.config.packed_reach + 1, self.tokens - start))
        return stream.source(start, self.window + 1, whole_document=True)

    def _stream_of(self, epoch: int) -> "Stream":
        table = self._cached("packed stream", lambda: self._table(epoch), epoch=epoch,
                             seed=self.config.random_seed)
        return Stream(self.dataset, table["order"], table["ends"])

    def _table(self, epoch: int) -> dict[str, np.ndarray]:
        n = len(self.indices)
        order = self.indices[Shuffle(n, self.config.random_seed, epoch, DOCUMENTS).order(0, n)]
        return {"order": order, "ends": np.cumsum(self.dataset.lengths[order], dtype=np.int64)}

    def report(self) -> str:
        return f"{self.samples_per_epoch} samples per epoch, {len(self.indices)} documents packed"

    def _empty(self) -> str:
        return (
            f"--data-path {self.dataset_path}: its {len(self.indices)} {self.index_split.name} "
            f"documents have {self.tokens} tokens, which do not fill --seq-length {self.window} + "
            "1; shorten the window or change --split"
        )


class Stream:
    """Documents laid end to end.

    Args:
        documents: in order.
        ends: tokens up to and with each, int64.
    """

    def __init__(self, corpus: Corpus, documents: np.ndarray, ends: np.ndarray):
        self.corpus, self.documents, self.ends = corpus, documents, ends

    def windows(self, window: int) -> int:
        """How many whole windows it holds, each with a last label."""
        return max(int(self.ends[-1]) - 1, 0) // window if len(self.ends) else 0

    def source(self, start: int, tokens: int, whole_document: bool = False) -> Source:
        """Tokens start to start + tokens - 1, to the end of the document if one holds them all."""
        at = int(self.ends.searchsorted(start, side="right"))
        first = start - (int(self.ends[at - 1]) if at else 0)
        pieces = []
        while tokens:
            document = int(self.documents[at])
            left = int(self.corpus.lengths[document]) - first
            if whole_document and not pieces and left >= tokens:
                return Source(self.corpus, ((document, first, left),))
            take = min(tokens, left)
            if take:  # a corpus may hold empty documents
                pieces.append((document, first, take))
            tokens, first, at = tokens - take, 0, at + 1
        return Source(self.corpus, tuple(pieces))


class PoseDataset(torch.utils.data.Dataset):
    """Samples with skip-wise positions: wraps a dataset of sources.

    `dataset[i]` holds int64 arrays of L values: `tokens`, `labels` (each token's true next one),
    `loss_mask` (ones) and `position_ids` in [0, T); only the last where `positions_only`, as a
    middle pipeline stage wants it, and then no token is read unless the sampler cuts at tokens.

    Args:
        sources: items {"source": Source}; the index is the sample's identity, so the plan of sample
            i is that of (sampler.seed, i) in every blend.
        sampler: of the positions.
        vocab_size: token ids must lie below it.

    Raises:
        ValueError: on a token id outside the vocabulary, naming corpus and document.
    """

    def __init__(self, sources, sampler: PoseSampler, vocab_size: int,
                 positions_only: bool = False):
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
            raise ValueError(
                f"--data-path {source.corpus.prefix}: token id {wrong} in document "
                f"{documents[0]} is outside the vocabulary of {self.vocab_size}; the corpus was "
                "made with another tokenizer"
            )
        return {"tokens": rows[0], "labels": rows[1],
                "loss_mask": np.ones_like(positions), "position_ids": positions}

    def name(self, index: int) -> str:
        """Where a sample comes from, in words for a person."""
        source = self.sources[index]["source"]
        document, first, _ = source.pieces[0]
        return f"sample {index}: {source.corpus.prefix}, document {document} from token {first}"


class Datasets(NamedTuple):
    """None where no samples were asked for, or where the rank does not load."""

    train: PoseDataset | MaterializedDataset | None
    valid: PoseDataset | None
    test: PoseDataset | None


def build_datasets(
    data: DataFlags, sampler: PoseSampler, vocab_size: int, train_samples: int,
    valid_samples: int, positions_only: bool = False, test_samples: int = 0,
    materialized_as: dict | None = None,
) -> Datasets:
    """Training samples by `sampler`, validation and test samples with plain positions.

    With --materialized the training samples are those on disk; `materialized_as` is what the run
    says of their positions.

    Every rank calls it (megatron-core's builder has barriers); only tensor-parallel rank 0 of a
    stage gets datasets, the others None.

    Raises:
        ValueError: naming flag, file and way out.
    """
    reads = not dist.is_initialized() or parallel_state.get_tensor_model_parallel_rank() == 0
    train = None
    if data.materialized and reads:
        train = MaterializedDataset(data.materialized, sampler.window, sampler.target,
                                    train_samples, vocab_size, materialized_as or {},
                                    positions_only)
    sizes = [0 if data.materialized else train_samples, valid_samples, test_samples]
    if not any(sizes):
        return Datasets(train, None, None)
    built = BlendBuilder(
        DocumentSpans if data.data_mode == "document" else PackedSpans,
        sizes, lambda: reads, _config(data, sampler, sizes),
    ).build()
    if not reads:
        return Datasets(None, None, None)
    for name, sources in zip(SPLITS, built, strict=True):
        for part in getattr(sources, "datasets", [sources]) if sources is not None else []:
            logger.info("%s, %s: %s", part.dataset_path, name, part.report())
    plain = PoseSampler(sampler.window, sampler.window, "full", seed=sampler.seed)
    drawn = Datasets(*(
        None if sources is None else PoseDataset(sources, law, vocab_size, positions_only)
        for sources, law in zip(built, (sampler, plain, plain), strict=True)))
    return drawn._replace(train=train) if data.materialized else drawn


def _config(data: DataFlags, sampler: PoseSampler, sizes: list[int]) -> PoseDatasetConfig:
    """megatron-core's description of the splits; those without samples are left out."""
    blend, per_split = blends(data)
    share = _split("969,30,1" if data.split is None else data.split)
    config = PoseDatasetConfig(
        random_seed=sampler.seed,
        sequence_length=data.seq_length,
        blend=blend,
        blend_per_split=per_split,
        split=share if blend else None,
        path_to_cache=data.data_cache_path,
        short_documents=data.short_documents,
        packed_reach=sampler.target if data.packed_skips == "stream" else 0,
    )
    parts = config.split_matrix if blend else config.blend_per_split
    for i, (name, size) in enumerate(zip(SPLITS, sizes, strict=True)):
        if size and parts[i] is None:
            raise ValueError(f"--split {share} leaves no {name} documents" if blend else
                             f"--{name}-data-path is missing: {size} {name} samples are wanted")
        if not size:
            parts[i] = None
    return config


def _split(text: str) -> str:
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(0 <= s < math.inf for s in shares) or not sum(shares):
        raise ValueError(f"--split {text} must be three shares, such as 969,30,1")
    return text
