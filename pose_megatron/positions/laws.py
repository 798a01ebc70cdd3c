"""The laws that give a sample its tokens and its positions: PoSE and its relatives.

A sample is a window of L tokens cut into N chunks. Chunk i has length l_i and starts at index
st_i = l_0 + ... + l_{i-1} of the window. Its positions start at u_i + st_i, its text at v_i + st_i
of the source (a document or a span of it, Lx tokens long), with both u and v non-decreasing, so a
chunk is continuous inside, chunks never overlap, and over many samples every relative distance
below T occurs (Zhu et al., "PoSE", ICLR 2024, arXiv 2309.10400, equations 3 to 5).

A new sampler is a function and a line of SAMPLERS:

    law(draw, sampler, target, source, chunk_starts) -> SkipPlan

    draw          the sample's random integers, or those of a batch of B samples
    sampler       sampler.PoseSampler: the law reads window L, num_chunks N, content and skip_law
    target        T; an int, in a batch an int or int64 [B]
    source        Lx >= L, tokens; an int, in a batch int64 [B]
    chunk_starts  where the text lets a chunk start, for samplers that read tokens: indices of the
                  window in {1, ..., L-1}, int64, ascending; else None
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from pose_megatron.positions.draws import Draw, Drawing, Integers

CONTENTS = ("uniform", "contiguous", "aligned")
SKIP_LAWS = ("chain", "sorted-uniform")
CREAM_SIGMA = 3.0  # the authors' constant, whatever the factor


class Settings(Protocol):
    """What a law reads of a `PoseSampler`, which says what they mean."""

    @property
    def window(self) -> int: ...
    @property
    def num_chunks(self) -> int: ...
    @property
    def content(self) -> str: ...
    @property
    def skip_law(self) -> str: ...


class SkipPlan(NamedTuple):
    """One sample's chunks, in order, each array int64 [N]; or B samples', int64 [B, N].

    Attributes:
        lengths: tokens of each chunk, l_i >= 1, summing to L. In a batch, a row with fewer chunks
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


def pose(
    draw: Drawing[Integers],
    sampler: Settings,
    target: Integers | int,
    source: Integers | int,
    chunk_starts: None,
) -> SkipPlan:
    """The paper's law for N chunks.

    l_i ~ U{1, ..., the most that leaves a token for each later chunk} (stick-breaking, Figure 6).
    u_0 = 0 and the later u_i by `skip_law`:
        chain           u_i ~ U{u_{i-1}, ..., T - L} (equation 4)
        sorted-uniform  N - 1 values of U{0, ..., T - L}, sorted: many chunks do not pile up near T,
                        as they do by the chain
    v_0 = 0 and the later v_i by `content`:
        uniform         v_i ~ U{v_{i-1}, ..., Lx - L} (equation 5)
        contiguous      v_i = 0
        aligned         v_i = u_i; in a source shorter than T, u is at most Lx - L
    """
    lengths: list[Integers | int] = []
    left: Integers | int = sampler.window
    for later in range(sampler.num_chunks - 1, 0, -1):
        lengths.append(draw.integer(1, left - later))
        left = left - lengths[-1]
    lengths.append(left)
    room, text_room = target - sampler.window, source - sampler.window
    if sampler.content == "aligned":
        room = _lesser(room, text_room)
    skips = _skips(draw, sampler.num_chunks, room, sampler.skip_law)
    texts: list[Integers | int]
    if sampler.content == "contiguous":
        texts = [0] * sampler.num_chunks
    elif sampler.content == "aligned":
        texts = skips
    else:
        texts = _skips(draw, sampler.num_chunks, text_room, "chain")
    return _plan(lengths, skips, texts)


def pose_reference(
    draw: Drawing[Integers],
    sampler: Settings,
    target: Integers | int,
    source: Integers | int,
    chunk_starts: None,
) -> SkipPlan:
    """PoSE as in its authors' code, always two chunks, so that their runs can be reproduced.

    l_0 ~ U{1, ..., (L + 1) // 2}; u_1 ~ U{0, ..., T - L}; v_1 ~ U{0, ..., min(Lx, 5 L) - L}
    (dwzhu-pku/PoSE, src/train_pose.py).
    """
    length = draw.integer(1, (sampler.window + 1) // 2)
    skip = draw.integer(0, target - sampler.window)
    text = draw.integer(0, _lesser(source, 5 * sampler.window) - sampler.window)
    return _plan([length, sampler.window - length], [0, skip], [0, text])


def pose_boundary(
    draw: Draw, sampler: Settings, target: int, source: int, chunk_starts: np.ndarray
) -> SkipPlan:
    """PoSE whose chunks start only after given tokens, such as the end of a turn.

    The first chunk starts at 0, the others at a uniform subset of `chunk_starts`: N - 1 of them,
    or all when there are fewer, so a window without any is plain. u by `skip_law` as in `pose`; the
    text is contiguous, as instruction data needs it.
    After axolotl's `pose_split_on_token_ids`, which takes every chunk start, as N = L does here.
    """
    count = min(sampler.num_chunks - 1, len(chunk_starts))
    taken = chunk_starts[draw.subset(len(chunk_starts), count)].tolist()
    lengths = np.diff([0, *taken, sampler.window]).tolist()
    skips = _skips(draw, len(lengths), target - sampler.window, sampler.skip_law)
    return _plan(lengths, skips, [0] * len(lengths))


def randpos(
    draw: Draw, sampler: Settings, target: int, source: int, chunk_starts: None
) -> SkipPlan:
    """L positions drawn without replacement from {0, ..., T-1}, sorted; the text is contiguous.

    The RandPos baseline of the paper's section 4.1 (Ruoss et al., ACL 2023).
    """
    positions = draw.subset(target, sampler.window)
    return SkipPlan(np.ones(sampler.window, np.int64), positions, np.arange(sampler.window))


def cream(draw: Draw, sampler: Settings, target: int, source: int, chunk_starts: None) -> SkipPlan:
    """Head, middle and tail; the tail ends at T - 1, the middle leans to the centre of the target.

    With f = T // L: head and tail have h tokens each, by a fair coin per sample h = L // 3 or
    h = min(4 f, L // 3); the middle has m = L - 2 h. With x ~ N(1 + f, 3) clipped to [2, 2 f] and
    a = floor(x), the middle's last position is ~ U{h + (m - 1) a // 2, ..., a L // 2 - h - 1}.
    Text: the head starts at 0, the tail ends at the source's end, the middle stands at its own
    positions where the source is long enough, else right before the tail; `contiguous` content
    takes the first L tokens.

    CREAM (Wu et al., NeurIPS 2024, arXiv 2406.07138; wutong4012/CREAM, src/train.py). Their code
    tosses one coin for many samples and has the mean 9, which is 1 + f for their f = 8.
    """
    window, factor = sampler.window, target // sampler.window
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
        starts if sampler.content == "contiguous" else texts,
    )


@lru_cache(maxsize=16)
def _cream_thresholds(factor: int) -> list[int]:
    """P(x < k) for k = 3, ..., 2 f and the x of `cream`, in units of 2**-53."""
    scale = CREAM_SIGMA * math.sqrt(2)
    return [
        int(0.5 * (1 + math.erf((k - 1 - factor) / scale)) * 2**53)
        for k in range(3, 2 * factor + 1)
    ]


def longrecipe(
    draw: Draw, sampler: Settings, target: int, source: int, chunk_starts: np.ndarray
) -> SkipPlan:
    """Sentences in slots: a skip between any two, the first tokens plain; the text is contiguous.

    The window's n sentences, which start at 0 and at `chunk_starts`, go in order into T - L + n
    slots: the first into the first slot, the others into the n - 1 last of a uniform n-subset. Each
    empty slot before a sentence is one skipped position. Then the first
    U{1, ..., (L + 1) // 2} tokens get back their plain positions.

    LongRecipe (Hu et al., arXiv 2409.00509; zhiyuanhubj/LongRecipe, preprocess_token_PI).
    """
    kept = draw.integer(1, (sampler.window + 1) // 2)
    starts = np.concatenate([[0], chunk_starts])
    slots = draw.subset(target - sampler.window + len(starts), len(starts))
    slots[0] = 0
    skips = slots - np.arange(len(slots))
    later = int(np.searchsorted(starts, kept, side="right"))  # sentences that start up to `kept`
    starts = np.concatenate([[0, kept], starts[later:]])
    skips = np.concatenate([[0], skips[later - 1 :]])
    return SkipPlan(np.diff(starts, append=sampler.window), starts + skips, starts)


def full(
    draw: Drawing[Integers],
    sampler: Settings,
    target: Integers | int,
    source: Integers | int,
    chunk_starts: None,
) -> SkipPlan:
    """Plain positions 0 to L-1 over the first L tokens."""
    return _plan([sampler.window], [0], [0])


def _skips(
    draw: Drawing[Integers], count: int, room: Integers | int, law: str
) -> list[Integers | int]:
    """u_0 = 0, ..., u_{N-1} up to `room`, by --pose-skip-law."""
    skips: list[Integers | int] = [0]
    if law == "sorted-uniform":
        return skips + draw.ascending(0, room, count - 1)
    for _ in range(count - 1):
        skips.append(draw.integer(skips[-1], room))
    return skips


def _lesser(a: Integers | int, b: Integers | int) -> Integers | int:
    """The smaller one, still a Python int where both are: numpy's would overflow in a Draw."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else np.minimum(a, b)


def _plan(
    lengths: Sequence[np.ndarray | int],
    skips: Sequence[np.ndarray | int],
    texts: Sequence[np.ndarray | int],
) -> SkipPlan:
    """The plan with the l, u and v of each chunk: ints, or int64 [B] in a batch."""
    starts: list[np.ndarray | int] = []
    end: np.ndarray | int = 0
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
    """A line of SAMPLERS.

    Attributes:
        law: the function.
        min_window: smallest L.
        in_chunks: whether the law heeds num_chunks and skip_law.
        in_batches: whether the law takes `Draws` and int64 [B] as well.
        reads_tokens: whether the law needs `chunk_starts`; then every pipeline stage reads tokens.
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
