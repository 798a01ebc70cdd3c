"""Reading a text with a model: what every evaluation is made of.

A `Reader` reads tokens in chunks and keeps their keys and values, so that each token goes through
the model once, however long the text is. On the way it says how well labels were foreseen. Logits
never leave it, and never stand in memory for more than a chunk.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

UNASKED = -1  # the label of a token whose successor is not asked for


@dataclass(frozen=True)
class Scores:
    """How well a model foresaw labels; zeros where the label is UNASKED.

    Attributes:
        loss: float32 [b, n], nats.
        best: int64 [b, n], the most likely token; of equally likely ones the first.
    """

    loss: Tensor
    best: Tensor


class Reader(ABC):
    """A model that reads rows of tokens from position 0 on.

    Attributes:
        vocab_size: token ids lie below it.
        batch_tokens: about how many tokens go through the model at once.
        kept: how many tokens are remembered, behind which the next are read.
        progress: called with the number of tokens just read.
    """

    # Chunks of what is kept have a multiple of so many tokens.
    multiple = 1

    def __init__(self, vocab_size: int, batch_tokens: int):
        self.vocab_size, self.batch_tokens = vocab_size, batch_tokens
        self.progress: Callable[[int], object] = lambda tokens: None
        self.kept = 0

    def begin(self, rows: int, tokens: int) -> None:
        """Forgets what was read and gets ready for rows of up to `tokens` tokens.

        Where frequencies depend on the length, it is this one from the first token on: the keys of
        a chunk serve all chunks behind it.
        """
        self.kept = 0
        self._begin(rows, tokens)

    def read(self, tokens: Tensor, labels: Tensor | None = None, keep: bool = True) -> Scores:
        """Reads on behind what is kept.

        Args:
            tokens: int64 [b, n], no more than `begin` was told. If they are kept, n is a multiple
                of `multiple`.
            labels: int64 [b, n], the token behind each, or UNASKED; None: all are.
            keep: whether what is read next stands behind them; else it takes their place.
        """
        assert not keep or tokens.size(1) % self.multiple == 0
        labels = torch.full_like(tokens, UNASKED) if labels is None else labels
        size = max(self.batch_tokens // len(tokens) // self.multiple, 1) * self.multiple
        chunks = list(zip(tokens.split(size, 1), labels.split(size, 1), strict=True))
        scores = self._read(chunks, self.kept)
        if keep:
            self.kept += tokens.size(1)
        return Scores(
            torch.cat([score.loss for score in scores], 1),
            torch.cat([score.best for score in scores], 1),
        )

    def rewind(self, kept: int) -> None:
        """Forgets what was read behind the first `kept` tokens, where an earlier reading ended."""
        assert kept <= self.kept
        self.kept = kept

    @abstractmethod
    def _begin(self, rows: int, tokens: int) -> None: ...

    @abstractmethod
    def _read(self, chunks: Sequence[tuple[Tensor, Tensor]], start: int) -> list[Scores]:
        """The scores of (tokens, labels), one chunk behind the other from position `start` on,
        where what stood there before is forgotten."""


def first_asked(labels: Tensor) -> int:
    """The first column of labels [b, n] that holds one; n where none does."""
    asked = (labels != UNASKED).any(0).nonzero()
    return int(asked[0]) if len(asked) else labels.size(1)


def score(
    logits: Tensor, labels: Tensor, first_id: int = 0, group: dist.ProcessGroup | None = None
) -> Scores:
    """What logits say of labels.

    Args:
        logits: [b, n, v]: of the tokens first_id to first_id + v - 1, all of the vocabulary or this
            rank's part of it. They are overwritten.
        labels: int64 [b, n].
        group: the ranks that hold the other parts; all of them call it, and have the same result.
    """
    logits = logits.float()
    if logits.size(-1):
        high, best = logits.max(-1)
        best = best + first_id
    else:  # a rank whose part is all padding
        high = logits.new_full(labels.shape, -torch.inf)
        best = labels.new_full(labels.shape, torch.iinfo(torch.int64).max)
    highest = _reduced(high, dist.ReduceOp.MAX, group)
    own = labels - first_id
    is_own = (own >= 0) & (own < logits.size(-1))
    label = logits.new_zeros(labels.shape)
    if logits.size(-1):
        label = logits.gather(-1, own.where(is_own, 0)[..., None])[..., 0].where(is_own, 0)
    total = logits.sub_(highest[..., None]).exp_().sum(-1)
    total, label = _reduced(torch.stack([total, label]), dist.ReduceOp.SUM, group)
    none = torch.iinfo(torch.int64).max
    best = _reduced(best.where(high == highest, none), dist.ReduceOp.MIN, group)
    asked = labels != UNASKED
    return Scores((total.log() + highest - label).where(asked, 0), best.where(asked, 0))


def _reduced(
    tensor: Tensor, how: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> Tensor:
    if group is not None and group.size() > 1:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor, how, group)
    return tensor
