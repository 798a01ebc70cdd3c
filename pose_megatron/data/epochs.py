"""How often a run reads each corpus.

An epoch of a corpus is each of its sources once: in document mode every window of L tokens of every
long enough document, in packed mode every window of the stream (spans.py). Samples are counted as
the blend hands them out, from the run's first step to its last, so the number of epochs is exact,
also in a resumed job. An epoch shows all of the text only with contiguous content: with the others,
later chunks come from anywhere further on in a document.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pose_megatron.data.blend import Blend
from pose_megatron.data.spans import Spans

# Up to which repeated text trains nearly as well as new text (Muennighoff et al., "Scaling
# Data-Constrained Language Models", 2023, arXiv 2305.16264).
HARMLESS = 4
# Each validation of ours reads the same samples; Megatron's pretrain() has others for each.
_OF = {"train": "this run", "valid": "validation", "test": "the test"}


@dataclass(frozen=True)
class Reading:
    """One corpus in one split.

    Attributes:
        split: train, valid or test.
        corpus: its sources.
        samples: how many of them are drawn.
    """

    split: str
    corpus: Spans
    samples: int

    @property
    def epochs(self) -> float:
        return self.samples / self.corpus.samples_per_epoch

    @property
    def is_many(self) -> bool:
        return self.split == "train" and self.epochs > HARMLESS

    def __str__(self) -> str:
        told = (
            f"{self.corpus.dataset_path}, {self.split}: {len(self.corpus.indices):,} documents, "
            f"{self.corpus.samples_per_epoch:,} samples an epoch, {self.samples:,} samples of "
            f"{_OF[self.split]}, {shown(self.epochs)} epochs"
        )
        if apart := self.corpus.apart():
            told += f"; {apart}"
        if self.is_many:
            told += (
                f"; WARNING: text that is read more than {HARMLESS} times teaches less and less "
                "(arXiv 2305.16264); add documents, lower its weight or train for less"
            )
        return told


def readings(split: str, sources: Blend | Spans | None) -> Iterator[Reading]:
    """How the samples of a split are divided over its corpora."""
    if isinstance(sources, Blend):
        for corpus, samples in zip(sources.datasets, sources.samples_of_each(), strict=True):
            yield Reading(split, corpus, int(samples))
    elif sources is not None:
        yield Reading(split, sources, len(sources))


def shown(epochs: float) -> str:
    """25.0, 0.4, 0.003: a part of an epoch is not none."""
    return f"{epochs:,.1f}" if epochs >= 0.1 or not epochs else f"{epochs:.1g}"
