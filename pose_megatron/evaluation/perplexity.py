"""How well a model uses its window: sliding-window perplexity, by any logits function."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pose_megatron.errors import ConfigError
from pose_megatron.evaluation.lengths import check_stride

Logits = Callable[[Tensor, int], Tensor]  # (tokens [b, s], last) -> float32 [b, last, vocabulary]


@dataclass(frozen=True)
class Perplexity:
    """exp of the token-weighted mean loss at one context length.

    Attributes:
        context_length: tokens that the model sees at once, C.
        perplexity: infinite when the loss overflows exp.
        loss: nats per scored token.
        standard_error: of `loss`, from the spread of its means per document; NaN for one document.
        tokens: scored tokens, the same ones at every context length.
        documents: how many documents they come from.
    """

    context_length: int
    perplexity: float
    loss: float
    standard_error: float
    tokens: int
    documents: int


def perplexities(
    logits: Logits,
    documents: Sequence[Tensor],
    context_lengths: Sequence[int],
    stride: int,
    batch_tokens: int = 16384,
    progress: Callable[[int], object] = lambda tokens: None,
    bos: int | None = None,
) -> Iterator[Perplexity]:
    """Perplexity at each context length, over the same scored tokens.

    Windows of C inputs end at longest, longest + stride, ... of each document, and each scores its
    last `stride` tokens: a scored token is preceded by C - stride + 1 to C tokens. Where windows
    end does not depend on C, so the perplexities of different C compare like with like.

    Args:
        logits: the model's; positions are 0 to C - 1 in every window.
        documents: int64 [n], each with n > longest context length.
        context_lengths: C in tokens, each at least `stride`.
        stride: tokens scored per window.
        batch_tokens: about how many input tokens go into one call.
        progress: called with the number of input tokens just done.
        bos: the token that every window begins with, in the place of its first one; the scored
            tokens are the same.

    Raises:
        ConfigError: no documents, one too short, or a stride above a context length.
    """
    longest = max(context_lengths)
    check_stride(stride, context_lengths)
    if not documents:
        raise ConfigError(f"no document has more than {longest} tokens to evaluate on")
    for i, document in enumerate(documents):
        if len(document) <= longest:
            raise ConfigError(
                f"document {i} has {len(document)} tokens, not more than the longest context "
                f"length, {longest}"
            )
    ends = [
        (i, end)
        for i, document in enumerate(documents)
        for end in range(longest, len(document), stride)
    ]
    for length in context_lengths:
        sums, counts = [0.0] * len(documents), [0] * len(documents)
        size = max(batch_tokens // length, 1)
        for batch in (ends[k : k + size] for k in range(0, len(ends), size)):
            windows = torch.stack([documents[i][end - length : end + 1] for i, end in batch])
            if bos is not None:
                windows[:, 0] = bos
            scored = logits(windows[:, :-1], stride)
            losses = F.cross_entropy(scored.transpose(1, 2), windows[:, -stride:], reduction="none")
            for (i, _), loss in zip(batch, losses.double().sum(1).tolist(), strict=True):
                sums[i] += loss
                counts[i] += stride
            progress(len(batch) * length)
        yield _summary(length, sums, counts)


def _summary(length: int, sums: list[float], counts: list[int]) -> Perplexity:
    tokens, n = sum(counts), len(sums)
    loss = sum(sums) / tokens
    # Spread of a ratio of sums over documents (Cochran, "Sampling Techniques", section 2.11).
    spread = sum((s - loss * c) ** 2 for s, c in zip(sums, counts, strict=True))
    error = math.sqrt(spread * n / (n - 1)) / tokens if n > 1 else math.nan
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Perplexity(length, perplexity, loss, error, tokens, n)
