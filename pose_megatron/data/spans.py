"""Which source each sample of a corpus is cut from, by `--data-mode`.

`document`: a document of n tokens gives (n - 1) // L samples, so that tokens, not documents, are
drawn evenly. The source of its sample w is the document from token w * L on: with contiguous
content each token is seen once per epoch; with the other contents the later chunks come from
anywhere further on in the same document.

`packed`: Megatron's stream: all documents of the split end to end, in a new order every epoch, and
a window every L tokens. A text skip never crosses a document: the source of a window within one
document is the rest of that document; a window over several documents is its own source, and only
its positions skip. `--packed-skips stream` lets the text skip up to T tokens along the stream.

The order depends on the seed and the epoch alone: not on ranks, workers, restarts or the number of
samples asked for. Memory: at most 12 bytes per document, shared through --data-cache-path; there is
no table per sample.
"""

from abc import abstractmethod
from dataclasses import dataclass, field

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset

from pose_megatron.data.index_cache import cached
from pose_megatron.data.indexed_corpus import IndexedCorpus
from pose_megatron.data.shuffle import Shuffle
from pose_megatron.data.source import Source
from pose_megatron.errors import ConfigError
from pose_megatron.positions.draws import DOCUMENTS, SAMPLES


@dataclass
class PoseDatasetConfig(BlendedMegatronDatasetConfig):
    """megatron-core's dataset settings and ours.

    Attributes:
        short_documents: in document mode, `drop` documents below L + 1 tokens, or `pack` them end
            to end.
        packed_reach: in packed mode, how many tokens of the stream a source may have; 0 keeps text
            skips inside a document.
        named_by: by prefix, the flag that named the corpus, for messages.
    """

    short_documents: str = "drop"
    packed_reach: int = 0
    named_by: dict[str, str] = field(default_factory=dict)


class Spans(MegatronDataset):
    """The sources of one split of one corpus, in a new order every epoch.

    `dataset[i]` is {"source": Source} for any i >= 0; i // samples_per_epoch is its epoch. The
    length is `num_samples`, or one epoch where that is None.

    Attributes:
        samples_per_epoch: at least 1.

    Raises:
        ConfigError: an epoch would have no sample.
    """

    samples_per_epoch: int

    def __init__(self, dataset, dataset_path, indices, num_samples, index_split, config):
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self.window = config.sequence_length
        self._prepare()
        if not self.samples_per_epoch:
            raise ConfigError(self._empty())
        self._epoch, self._shuffle = 0, self._shuffle_of(0)

    @abstractmethod
    def _prepare(self) -> None:
        """Sets samples_per_epoch, and what `_source` needs."""

    @abstractmethod
    def _source(self, epoch: int, sample: int) -> Source:
        """The source of sample number `sample` before the epoch is shuffled."""

    @abstractmethod
    def apart(self) -> str:
        """Which documents are not read as they are, in words for a person; "" for none."""

    @abstractmethod
    def _empty(self) -> str:
        """Why an epoch has no sample, and the way out."""

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedCorpus) -> int:
        return len(low_level_dataset.lengths)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: PoseDatasetConfig) -> IndexedCorpus:
        return IndexedCorpus(dataset_path, config.named_by.get(dataset_path, "--data-path"))

    def __len__(self) -> int:
        return self.samples_per_epoch if self.num_samples is None else self.num_samples

    def __getitem__(self, index: int) -> dict[str, Source]:
        epoch, i = divmod(int(index), self.samples_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._shuffle = epoch, self._shuffle_of(epoch)
        return {"source": self._source(epoch, self._shuffle[i])}

    def _shuffle_of(self, epoch: int) -> Shuffle:
        return Shuffle(self.samples_per_epoch, self.config.random_seed, epoch, SAMPLES)

    def _cached(self, table: str, build, **identity) -> dict[str, np.ndarray]:
        """`build`'s arrays about this split's documents, through the index cache."""
        documents = [int(self.indices[0]), len(self.indices)] if len(self.indices) else [0, 0]
        identity |= {"table": table, "corpus": self.dataset.identity, "documents": documents}
        return cached(self.config.path_to_cache, identity, build)


class DocumentSpans(Spans):
    """Document mode: each source is a document from one of its windows on.

    Attributes:
        dropped, packed: how many short documents are left out, or laid end to end.
    """

    def _prepare(self) -> None:
        pack = self.config.short_documents == "pack"
        table = self._cached(
            "document spans", lambda: self._table(pack), window=self.window, pack=pack
        )
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
            # Samples of all documents up to this one, itself included.
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

    def apart(self) -> str:
        if self.packed:
            return f"{self.packed:,} short documents packed"
        return f"{self.dropped:,} short documents dropped" if self.dropped else ""

    def _empty(self) -> str:
        longest = int(self.dataset.lengths[self.indices].max()) if len(self.indices) else 0
        return (
            f"{self.dataset.flag} {self.dataset_path}: none of its {len(self.indices)} "
            f"{self.index_split.name} documents fills --seq-length {self.window} + 1 tokens (the "
            f"longest has {longest}); shorten the window, use --short-documents pack or "
            "--data-mode packed, or change --split"
        )


class PackedSpans(Spans):
    """Packed mode: each source starts at a multiple of L in the epoch's stream of documents."""

    def _prepare(self) -> None:
        self.tokens = int(self.dataset.lengths[self.indices].sum(dtype=np.int64))
        self.samples_per_epoch = max(self.tokens - 1, 0) // self.window
        # The first epoch's stream is built now, so that loader processes, forked later, share it.
        self._stream = 0, self._stream_of(0)

    def _source(self, epoch: int, sample: int) -> Source:
        if epoch != self._stream[0]:
            self._stream = epoch, self._stream_of(epoch)
        stream, start = self._stream[1], sample * self.window
        if self.config.packed_reach:
            return stream.source(start, min(self.config.packed_reach + 1, self.tokens - start))
        return stream.source(start, self.window + 1, whole_document=True)

    def _stream_of(self, epoch: int) -> "Stream":
        table = self._cached(
            "packed stream", lambda: self._table(epoch), epoch=epoch, seed=self.config.random_seed
        )
        return Stream(self.dataset, table["order"], table["ends"])

    def _table(self, epoch: int) -> dict[str, np.ndarray]:
        n = len(self.indices)
        order = self.indices[Shuffle(n, self.config.random_seed, epoch, DOCUMENTS).order(0, n)]
        return {"order": order, "ends": np.cumsum(self.dataset.lengths[order], dtype=np.int64)}

    def apart(self) -> str:
        return "packed end to end"

    def _empty(self) -> str:
        return (
            f"{self.dataset.flag} {self.dataset_path}: its {len(self.indices)} "
            f"{self.index_split.name} documents have {self.tokens} tokens, which do not fill "
            f"--seq-length {self.window} + 1; shorten the window or change --split"
        )


class Stream:
    """Documents laid end to end.

    Args:
        documents: their numbers in the corpus, in the stream's order.
        ends: tokens of all documents up to each one, itself included, int64.
    """

    def __init__(self, corpus: IndexedCorpus, documents: np.ndarray, ends: np.ndarray):
        self.corpus, self.documents, self.ends = corpus, documents, ends

    def windows(self, window: int) -> int:
        """How many windows of `window` + 1 tokens start at multiples of `window`."""
        return max(int(self.ends[-1]) - 1, 0) // window if len(self.ends) else 0

    def source(self, start: int, tokens: int, whole_document: bool = False) -> Source:
        """The source of `tokens` tokens from `start` on.

        Args:
            whole_document: if one document holds them all, the source goes on to its end.
        """
        at = int(self.ends.searchsorted(start, side="right"))
        first = start - (int(self.ends[at - 1]) if at else 0)
        pieces: list[tuple[int, int, int]] = []
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
