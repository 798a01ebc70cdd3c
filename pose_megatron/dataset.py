"""Skip-wise samples over Megatron's indexed, memory-mapped corpora.

    prefix.bin/.idx ─► DocumentSpans: which document, from which token on (a Source; nothing read)
                    ─► BlendedDataset (megatron-core's, when there are several corpora)
                    ─► PoseDataset: plan of the sample, then exactly the tokens that it names

A document of n tokens gives (n - 1) // L samples. Sample w has the document from token w*L on as
its source, so that with contiguous content each token is seen once per epoch, and with the others
the later chunks come from anywhere further on in the same document. Order and plans depend on the
seed and the sample's index alone: not on ranks, workers, restarts or the number of samples asked.

Cost: an index of 8 bytes per document and no table per sample; a sample reads L + N tokens.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.indexed_dataset import (
    IndexedDataset,
    _IndexReader,
    get_bin_path,
    get_idx_path,
)
from megatron.core.datasets.megatron_dataset import MegatronDataset

from pose_megatron.arguments import DataFlags
from pose_megatron.positions import PoseSampler, SkipPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A stretch of tokens that a sample may be cut from: one piece of a document, or several packed
    end to end. Its last token is only ever a label.

    Attributes:
        corpus: where the tokens lie.
        pieces: (document, first token, tokens) in order.
    """

    corpus: "Corpus"
    pieces: tuple[tuple[int, int, int], ...]

    @property
    def length(self) -> int:
        """Lx: tokens that can be inputs."""
        return sum(n for _, _, n in self.pieces) - 1

    def read(self, plan: SkipPlan) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and their true next tokens, int64 [L] each, also at the end of a chunk."""
        runs = [self._tokens(start, length + 1) for start, length in plan.runs()]
        inputs = np.concatenate([run[:-1] for run in runs], dtype=np.int64)
        return inputs, np.concatenate([run[1:] for run in runs], dtype=np.int64)

    def _tokens(self, start: int, length: int) -> np.ndarray:
        parts = []
        for document, first, tokens in self.pieces:
            take = min(length, tokens - start)
            if take > 0:
                parts.append(self.corpus.tokens.get(document, first + start, take))
                length -= take
            start = max(start - tokens, 0)
            if not length:
                break
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Corpus:
    """`prefix.bin` and `prefix.idx`, checked to belong together.

    Raises:
        ValueError: a file is missing, truncated or not an index, or the corpus is empty.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        for path in (get_idx_path(prefix), get_bin_path(prefix)):
            if not Path(path).is_file():
                raise ValueError(
                    f"--data-path {prefix}: {path} is missing; the prefix is what "
                    "tools/preprocess_data.py wrote, such as corpus_text_document"
                )
        # The index alone first: the whole reader, when it fails half-way, prints from __del__.
        try:
            index = _IndexReader(get_idx_path(prefix), multimodal=False)
            assert index.document_indices[-1] == len(index), "its tables disagree"
        except Exception as error:  # the reader fails in many ways on foreign bytes
            raise ValueError(
                f"--data-path {prefix}: {get_idx_path(prefix)} is truncated or not a Megatron "
                f"index ({str(error) or type(error).__name__}); preprocess the corpus again"
            ) from None
        needed = int(index.sequence_lengths.sum(dtype=np.int64)) * index.dtype_size
        if not needed:
            raise ValueError(f"--data-path {prefix}: the corpus has no tokens")
        have = Path(get_bin_path(prefix)).stat().st_size
        if have != needed:
            raise ValueError(
                f"--data-path {prefix}: {get_bin_path(prefix)} has {have} bytes, its index "
                f"describes {needed}: truncated, or of another corpus; preprocess it again"
            )
        self.tokens = IndexedDataset(prefix)
        self.lengths = self.tokens.sequence_lengths


class Shuffle:
    """A pseudo-random permutation of [0, n) without a table: a Feistel network, walked in cycles
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002)."""

    ROUNDS = 6

    def __init__(self, n: int, seed: int, epoch: int):
        self.n = n
        self.half = max((max(n - 1, 1).bit_length() + 1) // 2, 1)
        self.mask = (1 << self.half) - 1
        key = np.array([seed, 1], dtype=np.uint64)  # plans use word 0: another stream
        counter = np.array([0, 0, 0, epoch], dtype=np.uint64)
        raw = np.random.Philox(key=key, counter=counter).random_raw(self.ROUNDS)
        self.keys = [int(k) for k in raw]

    def __getitem__(self, i: int) -> int:
        while True:
            left, right = i >> self.half, i & self.mask
            for key in self.keys:
                left, right = right, left ^ (self._mix(right ^ key) & self.mask)
            i = left << self.half | right
            if i < self.n:
                return i

    @staticmethod
    def _mix(x: int) -> int:
        """splitmix64's finaliser (Steele et al., 2014)."""
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        return x ^ x >> 31


@dataclass
class PoseDatasetConfig(BlendedMegatronDatasetConfig):
    """megatron-core's dataset settings and ours.

    Attributes:
        short_documents: `drop` documents below L + 1 tokens, or `pack` them end to end.
    """

    short_documents: str = "drop"


class DocumentSpans(MegatronDataset):
    """The sources of one split of one corpus, in a fresh order every epoch.

    `dataset[i]` is {"source": Source}. Without a number of samples it has one epoch's.
    """

    def __init__(self, dataset, dataset_path, indices, num_samples, index_split, config):
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        window = config.sequence_length
        lengths = dataset.lengths[indices].astype(np.int64)
        long = lengths > window
        self.documents = indices[long]
        self.windows = np.cumsum((lengths[long] - 1) // window)  # samples up to each document
        self.short = indices[~long] if config.short_documents == "pack" else indices[:0]
        self.stream = np.cumsum(dataset.lengths[self.short], dtype=np.int64)
        packed = max(int(self.stream[-1]) - 1, 0) // window if len(self.short) else 0
        self.from_documents = int(self.windows[-1]) if len(self.windows) else 0
        self.samples_per_epoch = self.from_documents + packed
        self.dropped = int((~long).sum()) if config.short_documents == "drop" else 0
        if num_samples != 0 and not self.samples_per_epoch:
            longest = int(lengths.max()) if len(lengths) else 0
            raise ValueError(
                f"--data-path {dataset_path}: none of its {len(lengths)} {index_split.name} "
                f"documents fills --seq-length {window} + 1 tokens (the longest has {longest}); "
                "shorten the window, use --short-documents pack, or change --split"
            )
        self._shuffles: dict[int, Shuffle] = {}

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Corpus) -> int:
        return len(low_level_dataset.lengths)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: PoseDatasetConfig) -> Corpus:
        return Corpus(dataset_path)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*MegatronDataset._key_config_attributes(), "short_documents"]

    def __len__(self) -> int:
        return self.samples_per_epoch if self.num_samples is None else self.num_samples

    def __getitem__(self, index: int) -> dict[str, Source]:
        epoch, i = divmod(int(index), self.samples_per_epoch)
        if epoch not in self._shuffles:
            n = self.samples_per_epoch
            self._shuffles = {epoch: Shuffle(n, self.config.random_seed, epoch)}
        return {"source": self._source(self._shuffles[epoch][i])}

    def _source(self, sample: int) -> Source:
        window = self.config.sequence_length
        if sample < self.from_documents:
            at = int(np.searchsorted(self.windows, sample, side="right"))
            before = int(self.windows[at - 1]) if at else 0
            document, first = int(self.documents[at]), (sample - before) * window
            length = int(self.dataset.lengths[document]) - first
            return Source(self.dataset, ((document, first, length),))
        start = (sample - self.from_documents) * window
        at = int(np.searchsorted(self.stream, start, side="right"))
        first = start - (int(self.stream[at - 1]) if at else 0)
        pieces, left = [], window + 1
        while left:
            document = int(self.short[at])
            take = min(left, int(self.dataset.lengths[document]) - first)
            if take:  # a corpus may hold empty documents
                pieces.append((document, first, take))
            left, first, at = left - take, 0, at + 1
        return Source(self.dataset, tuple(pieces))


class PoseDataset(torch.utils.data.Dataset):
    """Samples with skip-wise positions: wraps a dataset of sources.

    `dataset[i]` holds int64 arrays of L values: `tokens`, `labels` (each token's true next one),
    `loss_mask` (ones) and `position_ids` in [0, T); only the last where `positions_only`, as a
    middle pipeline stage wants it, and then no token is read.

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
        source = self.sources[index]["source"]
        plan = self.sampler.plan(index, source.length)
        sample = {"position_ids": plan.positions()}
        if self.positions_only:
            return sample
        tokens, labels = source.read(plan)
        lowest = min(int(tokens.min()), int(labels.min()))
        highest = max(int(tokens.max()), int(labels.max()))
        if lowest < 0 or highest >= self.vocab_size:
            documents = sorted({document for document, _, _ in source.pieces})
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"--data-path {source.corpus.prefix}: token id {wrong} in document "
                f"{documents[0]} is outside the vocabulary of {self.vocab_size}; the corpus was "
                "made with another tokenizer"
            )
        return {"tokens": tokens, "labels": labels,
                "loss_mask": np.ones_like(tokens), **sample}

    def name(self, index: int) -> str:
        """Where a sample comes from, in words for a person."""
        source = self.sources[index]["source"]
        document, first, _ = source.pieces[0]
        return f"sample {index}: {source.corpus.prefix}, document {document} from token {first}"


def build_datasets(
    data: DataFlags, sampler: PoseSampler, vocab_size: int, train_samples: int,
    valid_samples: int, positions_only: bool = False,
) -> tuple[PoseDataset, PoseDataset | None]:
    """Training samples by `sampler`, validation samples with plain positions.

    Every rank calls it (megatron-core's builder has barriers); only tensor-parallel rank 0 of a
    stage gets datasets, the others None.

    Raises:
        ValueError: naming flag, file and way out.
    """
    config = PoseDatasetConfig(
        random_seed=sampler.seed,
        sequence_length=data.seq_length,
        blend=_blend(data.data_path),
        split=_split(data.split),
        short_documents=data.short_documents,
    )
    sizes = [train_samples, valid_samples, 0]
    for name, share, size in zip(("train", "valid"), config.split_matrix, sizes, strict=False):
        if size and share is None:
            raise ValueError(f"--split {data.split} leaves no {name} documents")
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    builder = BlendedMegatronDatasetBuilder(DocumentSpans, sizes, lambda: reads, config)
    train, valid, _ = builder.build()
    if not reads:
        return None, None
    _report(train)
    plain = PoseSampler(sampler.window, sampler.window, "full", seed=sampler.seed)
    train = PoseDataset(train, sampler, vocab_size, positions_only)
    if not valid_samples:
        return train, None
    return train, PoseDataset(valid, plain, vocab_size, positions_only)


def _report(sources) -> None:
    for spans in getattr(sources, "datasets", [sources]):
        logger.info(
            "%s: %d samples per epoch, %d short documents dropped, %d packed",
            spans.dataset_path, spans.samples_per_epoch, spans.dropped, len(spans.short),
        )


def _blend(words: list[str]) -> tuple[list[str], list[float] | None]:
    if not words:
        raise ValueError("--data-path is missing: name the corpus that preprocess_data.py wrote")
    try:
        weights = [float(word) for word in words[::2]]
    except ValueError:
        return words, None
    prefixes = words[1::2]
    if len(prefixes) != len(weights) or not prefixes:
        raise ValueError(f"--data-path {' '.join(words)}: give 'weight prefix weight prefix ...'")
    for weight in weights:
        if not 0 < weight < math.inf:
            raise ValueError(f"--data-path: weight {weight} must be positive and finite")
    return prefixes, weights


def _split(text: str) -> str:
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(0 <= s < math.inf for s in shares) or not sum(shares):
        raise ValueError(f"--split {text} must be three shares, such as 969,30,1")
    return text
