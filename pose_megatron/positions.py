"""Where a sample's tokens come from and which positions they claim: the samplers of PoSE.

A sample is a window of L tokens cut into N chunks. Chunk i has length l_i and starts at index
st_i = l_0 + ... + l_{i-1} of the window. Its positions start at u_i + st_i, its text at v_i + st_i
of the source (a document or a span of it, Lx tokens long), with both u and v non-decreasing, so a
chunk is continuous inside, chunks never overlap, and over many samples every relative distance
below T occurs (Zhu et al., "PoSE", ICLR 2024, arXiv 2309.10400, equations 3 to 5).

A plan is a pure function of (seed, epoch, index): no global state, no dependence on ranks, workers,
restarts or numpy's version (numpy promises the raw stream of its bit generators, not what
`Generator` makes of it; only the raw stream is used here).

A new sampler is a function `(draw, window, target, source, num_chunks, content) -> SkipPlan` and a
line in `SAMPLERS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CONTENTS = ("uniform", "contiguous", "aligned")


@dataclass(frozen=True)
class SkipPlan:
    """One sample's chunks, in order; each array is int64 [N].

    Attributes:
        lengths: tokens of each chunk, l_i >= 1, summing to L.
        position_starts: position id of each chunk's first token, u_i + st_i.
        text_starts: index in the source of each chunk's first token, v_i + st_i.
    """

    lengths: np.ndarray
    position_starts: np.ndarray
    text_starts: np.ndarray

    def positions(self) -> np.ndarray:
        """Position id of every token, int64 [L], strictly increasing."""
        return self._expand(self.position_starts)

    def text(self) -> np.ndarray:
        """Index in the source of every token, int64 [L], strictly increasing."""
        return self._expand(self.text_starts)

    def runs(self) -> list[tuple[int, int]]:
        """(start, length) of each maximal contiguous stretch of text, in order."""
        ends = self.text_starts + self.lengths
        first = np.concatenate([[True], self.text_starts[1:] != ends[:-1]])
        last = np.append(first[1:], True)
        starts = self.text_starts[first]
        return list(zip(starts.tolist(), (ends[last] - starts).tolist(), strict=True))

    def _expand(self, starts: np.ndarray) -> np.ndarray:
        window_starts = np.cumsum(self.lengths) - self.lengths
        return np.arange(self.lengths.sum()) + np.repeat(starts - window_starts, self.lengths)


class Draw:
    """The random integers of one sample: Philox4x64-10, addressed by (seed, epoch, index).

    Seed is the key, epoch and index are words of the counter, so no two samples share a block
    (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
    """

    def __init__(self, seed: int, epoch: int, index: int):
        words = np.array([0, 0, index, epoch], dtype=np.uint64)  # words 0 and 1 count the blocks
        key = np.array([seed, 0], dtype=np.uint64)
        self._bits = np.random.Philox(key=key, counter=words)

    def integer(self, low: int, high: int) -> int:
        """Uniform in {low, ..., high}, both ends included; off by at most (high - low) / 2**64."""
        return low + (int(self._bits.random_raw()) * (high - low + 1) >> 64)

    def integers(self, below: int, count: int) -> np.ndarray:
        """`count` values uniform in [0, below), int64; below < 2**32."""
        raw = self._bits.random_raw(count)
        n, low = np.uint64(below), raw & np.uint64(0xFFFFFFFF)
        # The high word of the 128-bit product raw * n, from two 64-bit ones.
        high = (raw >> np.uint64(32)) * n + (low * n >> np.uint64(32))
        return (high >> np.uint64(32)).astype(np.int64)

    def subset(self, below: int, count: int) -> np.ndarray:
        """A uniformly drawn `count`-subset of [0, below), sorted, int64."""
        if count > below // 2:
            left_out = self.subset(below, below - count) if count < below else np.array([], int)
            return np.delete(np.arange(below), left_out)
        drawn = np.array([], dtype=np.int64)
        while True:  # the first `count` distinct draws are a uniform subset
            drawn = np.concatenate([drawn, self.integers(below, count + count // 2 + 8)])
            first = np.sort(np.unique(drawn, return_index=True)[1])
            if len(first) >= count:
                return np.sort(drawn[first[:count]])


def pose(
    draw: Draw, window: int, target: int, source: int, num_chunks: int, content: str
) -> SkipPlan:
    """The paper's law for N chunks.

    l_i ~ U{1, ..., what leaves a token for each later chunk} (stick-breaking, Figure 6);
    u_0 = 0, u_i ~ U{u_{i-1}, ..., T - L} (equation 4);
    v_0 = 0 and, by `content`: uniform, v_i ~ U{v_{i-1}, ..., Lx - L} (equation 5); contiguous,
    v_i = 0; aligned, v_i = u_i, where a source shorter than T bounds u by Lx - L.
    """
    lengths, left = [], window
    for later in range(num_chunks - 1, 0, -1):
        lengths.append(draw.integer(1, left - later))
        left -= lengths[-1]
    lengths.append(left)
    room = target - window
    if content == "aligned":
        room = min(room, source - window)
    skips = _chain(draw, num_chunks, room)
    if content == "uniform":
        texts = _chain(draw, num_chunks, source - window)
    else:
        texts = skips if content == "aligned" else [0] * num_chunks
    lengths = np.array(lengths, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    return SkipPlan(lengths, starts + skips, starts + texts)


def _chain(draw: Draw, count: int, room: int) -> list[int]:
    values = [0]
    for _ in range(count - 1):
        values.append(draw.integer(values[-1], room))
    return values


def randpos(
    draw: Draw, window: int, target: int, source: int, num_chunks: int, content: str
) -> SkipPlan:
    """L positions drawn without replacement from {0, ..., T-1}, sorted; the text is contiguous.

    The RandPos baseline of the paper's section 4.1 (Ruoss et al., ACL 2023).
    """
    return SkipPlan(np.ones(window, np.int64), draw.subset(target, window), np.arange(window))


def full(
    draw: Draw, window: int, target: int, source: int, num_chunks: int, content: str
) -> SkipPlan:
    """Plain positions 0 to L-1 over the first L tokens."""
    zero = np.zeros(1, np.int64)
    return SkipPlan(np.array([window]), zero, zero)


SAMPLERS: dict[str, Callable[..., SkipPlan]] = {"pose": pose, "randpos": randpos, "full": full}


@dataclass(frozen=True)
class PoseSampler:
    """Draws the plan of each sample.

    Attributes:
        window: L, tokens of a sample.
        target: T; positions lie in [0, T).
        name: a key of SAMPLERS.
        num_chunks: N, for `pose`.
        content: rule for v, for `pose`; one of CONTENTS.
        seed: non-negative, below 2**64.

    Raises:
        ValueError: naming the flag, its value and the way out.
    """

    window: int
    target: int
    name: str = "pose"
    num_chunks: int = 2
    content: str = "uniform"
    seed: int = 1234

    def __post_init__(self):
        if self.name not in SAMPLERS:
            raise ValueError(f"--position-sampler {self.name} is none of {', '.join(SAMPLERS)}")
        if self.content not in CONTENTS:
            raise ValueError(f"--pose-content {self.content} is none of {', '.join(CONTENTS)}")
        if self.window < 1:
            raise ValueError(f"--seq-length must be at least 1, not {self.window}")
        if self.window > self.target:
            raise ValueError(
                f"--seq-length {self.window} (the window L) is greater than "
                f"--max-position-embeddings {self.target} (the target T); raise the latter"
            )
        if self.name == "pose" and not 1 <= self.num_chunks <= self.window:
            raise ValueError(
                f"--pose-num-chunks {self.num_chunks} must lie between 1 and --seq-length "
                f"{self.window}: every chunk has at least one token"
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"--seed {self.seed} must lie in [0, 2**64)")

    def plan(self, index: int, source: int, epoch: int = 0) -> SkipPlan:
        """The plan of sample `index` of `epoch`, over a source of `source` tokens.

        Raises:
            ValueError: the source is shorter than the window.
        """
        if source < self.window:
            raise ValueError(
                f"sample {index}: its source has {source} tokens, fewer than --seq-length "
                f"{self.window}"
            )
        draw = Draw(self.seed, epoch, index)
        return SAMPLERS[self.name](
            draw, self.window, self.target, source, self.num_chunks, self.content
        )
