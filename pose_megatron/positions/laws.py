"""The laws by which a sample takes its tokens and its positions: PoSE and its relatives.

A sample is a window of L tokens cut into N chunks. Chunk i has length l_i and starts at index
st_i = l_0 + ... + l_{i-1} of the window. Its positions start at u_i + st_i, its text at v_i + st_i
of the source (a document or a span of it, Lx tokens long), with both u and v non-decreasing, so a
chunk is continuous inside, chunks never overlap, and over many samples every relative distance
below T occurs (Zhu et al., "PoSE", ICLR 2024, arXiv 2309.10400, equations 3 to 5).

A new sampler is a function `(draw, ask, target, source, cuts) -> SkipPlan` and a line of SAMPLERS:

    draw    random integers of the sample, or of a batch of B samples
    ask     positions.PoseSampler, for its window L, num_chunks N, content and skip_law
    target  T; an int, in a batch perhaps int64 [B]
    source  Lx >= L, tokens; an int, in a batch int64 [B]
    cuts    for samplers that read tokens: window indices in {1, ..., L-1} at which a chunk may
            start, int64, ascending; else None
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pose_megatron.positions.draws import Draw, Draws

CONTENTS = ("uniform", "contiguous", "aligned")
SKIP_LAWS = ("chain", "sorted-uniform")
CREAM_SIGMA = 3.0  # the authors' constant, whatever the factor


class SkipPlan(NamedTuple):
    """One sample's chunks, in order; each array is int64 [N]. Of a batch, int64 [B, N].

    Attributes:
        lengths: tokens of each chunk, l_i >= 1, summing to L. In a batch a row with fewer chunks
            than others ends in chunks of no tokens.
        position_starts: position id of each chunk's first token, u_i + st_i.
        text_starts: index in the source of each chunk's first token, v_i + st_i.
    """

    lengths: np.ndarray
    position_starts: np.ndarray
    text_starts: np.ndarray

    def positions(self) -> np.ndarray:
        """Position id of every token, int64 [L] or [B, L], strictly increasing."""
        return self._expand(self.position_starts)

    def text(self) -> np.ndarray:
        """Index in the source of every token, int64 [L] or [B, L], strictly increasing."""
        return self._expand(self.text_starts)

    def runs(self) -> list[tuple[int, int]]:
        """(start, length) of each maximal contiguous stretch of one sample's text, in order."""
        runs: list[tuple[int, int]] = []
        end = -1
        for start, length in zip(self.text_starts.tolist(), self.lengths.tolist(), strict=True):
            if start == end:
                start, length = runs[-1][0], runs.pop()[1] + length
            runs.append((start, length))
            end = start + length
        return runs

    def plain(self) -> "SkipPlan":
        """The same chunks, with positions and text from 0 on and without skips."""
        starts = self._window_starts()
        return SkipPlan(self.lengths, starts, starts)

    def _window_starts(self) -> np.ndarray:
        return np.cumsum(self.lengths, axis=-1) - self.lengths

    def _expand(self, starts: np.ndarray) -> np.ndarray:
        if self.lengths.ndim == 1 and len(self.lengths) <= 8:  # the quicker way for few chunks
            pieces = zip(starts.tolist(), self.lengths.tolist(), strict=True)
            return np.concatenate([np.arange(start, start + n) for start, n in pieces])
        skips = np.repeat((starts - self._window_starts()).ravel(), self.lengths.ravel())
        rows = skips.reshape(*self.lengths.shape[:-1], -1)
        return rows + np.arange(rows.shape[-1])


def pose(draw: Draw | Draws, ask, target, source, cuts) -> SkipPlan:
    """The paper's law for N chunks.

    l_i ~ U{1, ..., what leaves a token for each later chunk} (stick-breaking, Figure 6);
    u_0 = 0 and, by `skip_law`: chain, u_i ~ U{u_{i-1}, ..., T - L} (equation 4); sorted-uniform,
    u_1 <= ... <= u_{N-1} are N - 1 values of U{0, ..., T - L} in order, which for large N does not
    crowd the last chunks toward T as the chain does;
    v_0 = 0 and, by `content`: uniform, v_i ~ U{v_{i-1}, ..., Lx - L} (equation 5); contiguous,
    v_i = 0; aligned, v_i = u_i, where a source shorter than T bounds u by Lx - L.
    """
    lengths, left = [], ask.window
    for later in range(ask.num_chunks - 1, 0, -1):
        lengths.append(draw.integer(1, left - later))
        left = left - lengths[-1]
    lengths.append(left)
    room, text_room = target - ask.window, source - ask.window
    if ask.content == "aligned":
        room = _lesser(room, text_room)
    skips = _skips(draw, ask.num_chunks, room, ask.skip_law)
    if ask.content == "contiguous":
        texts = [0] * ask.num_chunks
    elif ask.content == "aligned":
        texts = skips
    else:
        texts = _skips(draw, ask.num_chunks, text_room, "chain")
    return _plan(lengths, skips, texts)


def pose_reference(draw: Draw | Draws, ask, target, source, cuts) -> SkipPlan:
    """PoSE as its authors' code has it, always two chunks, so that their runs can be reproduced.

    l_0 ~ U{1, ..., (L + 1) // 2}; u_1 ~ U{0, ..., T - L}; v_1 ~ U{0, ..., min(Lx, 5 L) - L}
    (dwzhu-pku/PoSE, src/train_pose.py).
    """
    length = draw.integer(1, (ask.window + 1) // 2)
    skip = draw.integer(0, target - ask.window)
    text = draw.integer(0, _lesser(source, 5 * ask.window) - ask.window)
    return _plan([length, ask.window - length], [0, skip], [0, text])


def pose_boundary(draw: Draw, ask, target, source, cuts) -> SkipPlan:
    """PoSE whose chunks start only after given tokens, such as the end of a turn.

    min(N, cuts + 1) chunks; which of the possible cuts are taken is uniform; u by `skip_law` as in
    `pose`; the text is contiguous, as instruction data needs it. A window without a cut is plain.
    After axolotl's `pose_split_on_token_ids`, which takes every cut: N = L does.
    """
    taken = cuts[draw.subset(len(cuts), min(ask.num_chunks - 1, len(cuts)))].tolist()
    lengths = np.diff([0, *taken, ask.window]).tolist()
    skips = _skips(draw, len(lengths), target - ask.window, ask.skip_law)
    return _plan(lengths, skips, [0] * len(lengths))


def randpos(draw: Draw, ask, target, source, cuts) -> SkipPlan:
    """L positions drawn without replacement from {0, ..., T-1}, sorted; the text is contiguous.

    The RandPos baseline of the paper's section 4.1 (Ruoss et al., ACL 2023).
    """
    positions = draw.subset(target, ask.window)
    return SkipPlan(np.ones(ask.window, np.int64), positions, np.arange(ask.window))


def cream(draw: Draw, ask, target, source, cuts) -> SkipPlan:
    """Head, middle and tail; the tail ends at T - 1, the middle leans to the centre of the target.

    With f = T // L: a fair coin per sample makes head and tail L // 3 tokens each, or 4 f (at most
    L // 3); m is the middle's length. A number a is x rounded down, x ~ N(1 + f, 3) clipped to
    [2, 2 f]; the middle's last position ~ U{h + (m - 1) a // 2, ..., a L // 2 - h - 1}.
    Text: head at 0, tail at the source's end, the middle at its own positions where the source
    reaches so far, else right before the tail; `contiguous` content takes the first L tokens.

    CREAM (Wu et al., NeurIPS 2024, arXiv 2406.07138; wutong4012/CREAM, src/train.py). Their code
    tosses one coin for many samples and has the mean 9, which is 1 + f for their f = 8.
    """
    window, factor = ask.window, target // ask.window
    head = window // 3 if draw.integer(0, 1) else min(4 * factor, window // 3)
    middle = window - 2 * head
    a = 2 + bisect_right(_cream_thresholds(factor), draw.integer(0, 2**53 - 1))
    last = draw.integer(head + (middle - 1) * a // 2, a * window // 2 - head - 1)
    first, tail, source_tail = last - middle + 1, target - head, source - head
    starts = np.array([0, head, head + middle])
    texts = np.array([0, min(first, source_tail - middle), source_tail])
    return SkipPlan(
        np.array([head, middle, head]),
        np.array([0, first, tail]),
        starts if ask.content == "contiguous" else texts,
    )


@lru_cache(maxsize=16)
def _cream_thresholds(factor: int) -> list[int]:
    """P(x < k) for k = 3, ..., 2 f, in units of 2**-53."""
    scale = CREAM_SIGMA * math.sqrt(2)
    return [
        int(0.5 * (1 + math.erf((k - 1 - factor) / scale)) * 2**53)
        for k in range(3, 2 * factor + 1)
    ]


def longrecipe(draw: Draw, ask, target, source, cuts) -> SkipPlan:
    """Sentences in slots: a skip between any two, the first tokens plain; the text is contiguous.

    n sentences, which end where `cuts` says, take the first slot and the n - 1 upper ones of a
    uniform n-subset of T - L + n slots; each empty slot is one skipped position. Then the first
    U{1, ..., (L + 1) // 2} tokens get back their plain positions.

    LongRecipe (Hu et al., arXiv 2409.00509; zhiyuanhubj/LongRecipe, preprocess_token_PI).
    """
    kept = draw.integer(1, (ask.window + 1) // 2)
    starts = np.concatenate([[0], cuts])
    slots = draw.subset(target - ask.window + len(starts), len(starts))
    slots[0] = 0
    skips = slots - np.arange(len(slots))
    cut = int(np.searchsorted(starts, kept, side="right"))  # sentence cut - 1 holds token `kept`
    starts = np.concatenate([[0, kept], starts[cut:]])
    skips = np.concatenate([[0], skips[cut - 1 :]])
    return SkipPlan(np.diff(starts, append=ask.window), starts + skips, starts)


def full(draw: Draw | Draws, ask, target, source, cuts) -> SkipPlan:
    """Plain positions 0 to L-1 over the first L tokens."""
    return _plan([ask.window], [0], [0])


def _skips(draw: Draw | Draws, count: int, room, law: str) -> list:
    values = [0]
    if law == "chain":
        for _ in range(count - 1):
            values.append(draw.integer(values[-1], room))
        return values
    values = [draw.integer(0, room) for _ in range(count - 1)]
    batch = isinstance(draw, Draws)
    return [0, *(np.sort(np.array(values), axis=0) if batch else sorted(values))]


def _lesser(a, b):
    """The smaller one, still a Python int where both are: numpy's would overflow in a Draw."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else np.minimum(a, b)


def _plan(lengths: list, skips: list, texts: list) -> SkipPlan:
    """From l, u and v of each chunk: ints, or int64 [B] in a batch."""
    starts, end = [], 0
    for length in lengths:
        starts.append(end)
        end = end + length
    rows = [
        lengths,
        [u + st for u, st in zip(skips, starts, strict=True)],
        [v + st for v, st in zip(texts, starts, strict=True)],
    ]
    if isinstance(end, int):
        return SkipPlan(*np.array(rows, dtype=np.int64))
    return SkipPlan(*(np.stack(np.broadcast_arrays(*row), axis=-1) for row in rows))


class Sampler(NamedTuple):
    """A line of the registry.

    Attributes:
        law: the function.
        min_window: smallest L.
        in_chunks: the law heeds num_chunks and skip_law.
        in_batches: the law takes `Draws` and int64 [B] as well.
        reads_tokens: the law needs `cuts`, so every pipeline stage must read tokens.
    """

    law: Callable[..., SkipPlan]
    min_window: int = 1
    in_chunks: bool = False
    in_batches: bool = False
    reads_tokens: bool = False


SAMPLERS: dict[str, Sampler] = {
    "pose": Sampler(pose, in_chunks=True, in_batches=True),
    "randpos": Sampler(randpos),
    "full": Sampler(full, in_batches=True),
    "pose-reference": Sampler(pose_reference, min_window=2, in_batches=True),
    "pose-boundary": Sampler(pose_boundary, in_chunks=True, reads_tokens=True),
    "cream": Sampler(cream, min_window=3),
    "longrecipe": Sampler(longrecipe, min_window=2, reads_tokens=True),
}
