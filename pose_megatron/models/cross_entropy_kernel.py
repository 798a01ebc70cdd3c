"""Cross entropy of vocabulary-parallel logits: a Triton kernel each way, and no copy of the logits.

Forward, one pass over a row of this rank's logits gives what the ranks exchange: its largest logit,
the sum of the exponentials over it, and the logit of the label. Backward, the row is read once
more, and the gradient takes its place. All of it is computed in float32, whatever the logits' type.

Needs Triton, so it is imported only where it computes. With TRITON_INTERPRET=1 in the environment
before Triton is imported, the same code runs on a CPU, slowly; there results in bfloat16 are cut,
which a GPU rounds.

Shapes: s = tokens, b = samples, w = this rank's share of the vocabulary, with its padding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 8


@triton.jit
def statistics_kernel(logits, labels, largest, total, picked, first, width, LANES: tl.constexpr):
    """One row of `width` logits, of the vocabulary's entries from `first` on."""
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * width
    lane = tl.arange(0, LANES)
    high = -float("inf")
    sums = tl.zeros((LANES,), tl.float32)
    for start in range(0, width, LANES):
        column = start + lane
        x = tl.load(source + column, mask=column < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(high, tl.max(x, axis=0))
        # Infinity less itself is not a number: entries that are barred by -inf have no share.
        over = tl.where(higher == -float("inf"), 0.0, higher)
        sums = sums * tl.exp(high - over) + tl.exp(x - over)
        high = higher
    tl.store(largest + row, high)
    tl.store(total + row, tl.sum(sums, axis=0))
    label = tl.load(labels + row) - first
    mine = (label >= 0) & (label < width)
    tl.store(picked + row, tl.load(source + label, mask=mine, other=0.0).to(tl.float32))


@triton.jit
def gradient_kernel(logits, labels, largest, total, grad, first, width, LANES: tl.constexpr):
    """The same row, which its gradient replaces."""
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * width
    lane = tl.arange(0, LANES)
    label = tl.load(labels + row) - first
    high, share = tl.load(largest + row), 1.0 / tl.load(total + row)
    slope = tl.load(grad + row)
    for start in range(0, width, LANES):
        column = start + lane
        mask = column < width
        x = tl.load(source + column, mask=mask, other=0.0).to(tl.float32)
        probability = tl.exp(x - high) * share
        y = tl.where(column == label, probability - 1.0, probability) * slope
        tl.store(source + column, y, mask=mask)


# Whether Triton interprets them.
RUNS_ON_CPU = not isinstance(gradient_kernel, triton.JITFunction)


def constants(width: int) -> dict[str, int]:
    """What a share of the vocabulary fixes when a kernel is compiled."""
    return {"LANES": min(triton.next_power_of_2(width), 4096)}


def statistics(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a rank knows of each row.

    Args:
        logits: [s, b, w], contiguous.
        labels: [s, b] int64, contiguous, of the whole vocabulary.
        first: the entry of the vocabulary that this rank's share begins with.

    Returns:
        In float32, [s, b] each: the largest logit, the sum of exp(logit - largest), and the label's
        logit, 0 where the label is another rank's.
    """
    width = logits.size(-1)
    found = [torch.empty(labels.shape, dtype=torch.float32, device=logits.device) for _ in range(3)]
    statistics_kernel[(labels.numel(),)](
        logits, labels, *found, first, width, **constants(width), num_warps=WARPS
    )
    largest, total, picked = found
    return largest, total, picked


def write_gradient(
    logits: Tensor, labels: Tensor, first: int, largest: Tensor, total: Tensor, grad: Tensor
) -> None:
    """Overwrites the logits with their gradient, (softmax - (1 at the label)) grad.

    Args:
        logits, labels, first: as `statistics`.
        largest, total: the same as it returns, but of all ranks; [s, b] float32, contiguous.
        grad: of the loss; [s, b] float32, contiguous.
    """
    width = logits.size(-1)
    gradient_kernel[(labels.numel(),)](
        logits, labels, largest, total, grad, first, width, **constants(width), num_warps=WARPS
    )
