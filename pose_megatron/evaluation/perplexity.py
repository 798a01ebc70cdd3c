"""How well a model foresees text, by how much of it stands before.

Two measures. By position, a document goes through the model once, and its tokens are scored in bins
of position: one pass gives the whole row, but each bin scores other tokens, so compare models with
each other in a bin. In sliding windows every context length scores the same tokens, so that lengths
can be compared; each window is a pass of its own.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pose_megatron.errors import ConfigError
from pose_megatron.evaluation.lengths import check_stride
from pose_megatron.evaluation.reading import UNASKED, Reader
from pose_megatron.evaluation.record import Record
from pose_megatron.evaluation.replicas import batches


@dataclass(frozen=True)
class Perplexity:
    """exp of the token-weighted mean loss at one context length.

    Attributes:
        context_length: tokens that the model sees at once at most, C.
        perplexity: infinite when the loss overflows exp.
        loss: nats per scored token.
        standard_error: of `loss`, from the spread of its means per document; NaN for one document.
        tokens: scored tokens.
        documents: how many documents they come from.
        by_document: the loss of each, so that models can be compared on the same document.
    """

    context_length: int
    perplexity: float
    loss: float
    standard_error: float
    tokens: int
    documents: int
    by_document: list[float]


class Loss(NamedTuple):
    """The loss of a document's scored tokens: their sum in nats, and their number."""

    total: float
    tokens: int


class Perplexities:
    """A model's perplexities on some documents, part by part.

    Args:
        documents: int64 [n] each, n > the longest context length.
        context_lengths: C in tokens, ascending.
        record: what is done already, and where parts go.
        bos: the token that stands in the place of the first one of whatever is read; the scored
            tokens are the same.
        say: called with a line for each document by position.

    Raises:
        ConfigError: no documents, or one too short.
    """

    def __init__(
        self,
        reader: Reader,
        documents: Sequence[Tensor],
        context_lengths: Sequence[int],
        record: Record,
        bos: int | None = None,
        say: Callable[[str], object] = lambda line: None,
    ):
        _check_documents(documents, context_lengths[-1])
        self.reader, self.documents, self.lengths = reader, documents, context_lengths
        self.record, self.bos, self.say = record, bos, say

    def by_position(self) -> Iterator[Perplexity]:
        """Of the tokens with 1 to C_1 tokens before them, with C_1 + 1 to C_2, and so on, each
        under the longest length that it has; all of them after the last document."""
        n = len(self.documents)

        def say(number: int, row: list[Loss]) -> None:
            means = " ".join(f"{total / tokens:.3f}" for total, tokens in row)
            self.say(f"document {number + 1} of {n}: loss {means}")

        rows = max(self.reader.batch_tokens // self.lengths[-1], 1)
        parts = [{"document": i} for i in range(n)]
        found = self.record.complete(parts, [self.lengths[-1]] * n, self._rows, rows, say)
        for k, length in enumerate(self.lengths):
            yield summary(length, [Loss(*row[k]) for row in found])

    def in_windows(self, stride: int) -> Iterator[Perplexity]:
        """Each length's after its last window.

        Windows of C inputs end at longest, longest + stride, ... of each document, and each scores
        its last `stride` tokens: a scored token is preceded by C - stride + 1 to C tokens. Where
        windows end does not depend on C, so that different C score the same tokens.

        Raises:
            ConfigError: the stride is above a context length.
        """
        check_stride(stride, self.lengths)
        for length in self.lengths:
            every = range(len(self.documents))
            parts = [{"document": i, "context_length": length} for i in every]
            tokens = [length * len(self._ends(document, stride)) for document in self.documents]
            found = self.record.complete(parts, tokens, partial(self._windows, length, stride))
            yield summary(length, [Loss(*loss) for loss in found])

    def _rows(self, numbers: Sequence[int]) -> list[list[Loss]]:
        """For each of these documents, side by side, its loss in each bin."""
        rows = torch.stack([self.documents[i][: self.lengths[-1] + 1] for i in numbers])
        losses = self._losses(rows, rows[:, 1:])
        starts = [0, *self.lengths[:-1]]
        return [
            [Loss(row[a:b].sum().item(), b - a) for a, b in zip(starts, self.lengths, strict=True)]
            for row in losses
        ]

    def _windows(self, length: int, stride: int, numbers: Sequence[int]) -> list[Loss]:
        """For each of these documents, one after the other, its loss in windows of `length`
        inputs."""
        return [self._in_windows(self.documents[i], length, stride) for i in numbers]

    def _ends(self, document: Tensor, stride: int) -> range:
        return range(self.lengths[-1], len(document), stride)

    def _in_windows(self, document: Tensor, length: int, stride: int) -> Loss:
        total = 0.0
        ends = self._ends(document, stride)
        for some in batches(ends, max(self.reader.batch_tokens // length, 1)):
            windows = torch.stack([document[end - length : end + 1] for end in some])
            labels = torch.full_like(windows[:, 1:], UNASKED)
            labels[:, -stride:] = windows[:, -stride:]
            total += self._losses(windows, labels).sum().item()
        return Loss(total, len(ends) * stride)

    def _losses(self, rows: Tensor, labels: Tensor) -> Tensor:
        """float64, of rows with their last token."""
        tokens = rows[:, :-1].clone()
        if self.bos is not None:
            tokens[:, 0] = self.bos
        self.reader.begin(*tokens.shape)
        return self.reader.read(tokens, labels, keep=False).loss.double()


def _check_documents(documents: Sequence[Tensor], longest: int) -> None:
    if not documents:
        raise ConfigError(f"no document has more than {longest} tokens to evaluate on")
    for i, document in enumerate(documents):
        if len(document) <= longest:
            raise ConfigError(
                f"document {i} has {len(document)} tokens, not more than the longest context "
                f"length, {longest}"
            )


def summary(context_length: int, losses: Sequence[Loss]) -> Perplexity:
    """Over documents."""
    tokens, n = sum(loss.tokens for loss in losses), len(losses)
    mean = sum(loss.total for loss in losses) / tokens
    # Spread of a ratio of sums over documents (Cochran, "Sampling Techniques", section 2.11).
    spread = sum((loss.total - mean * loss.tokens) ** 2 for loss in losses)
    error = math.sqrt(spread * n / (n - 1)) / tokens if n > 1 else math.nan
    perplexity = math.exp(mean) if mean < 700 else math.inf
    means = [loss.total / loss.tokens for loss in losses]
    return Perplexity(context_length, perplexity, mean, error, tokens, n, means)
