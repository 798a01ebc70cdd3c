"""Random integers addressed by what they are for: the same on every rank, worker and restart.

Philox4x64-10 turns a key and a counter into four 64-bit words (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", 2011). Here the key is (seed, stream) and the counter
(block, 0, index, epoch), so no two samples share a block. Nothing depends on numpy's version: numpy
promises the raw words of its bit generators, and only those are used.
"""

from functools import lru_cache
from typing import Protocol, TypeVar

import numpy as np

# The streams of a seed, numbered here only: whatever draws by itself has a number of its own.
PLANS, SHUFFLES, COINS, PASSKEYS, SENTENCES, RULER = range(6)
# The two orders that SHUFFLES draws (data/shuffle.py): third word of the counter.
SAMPLES, DOCUMENTS = range(2)

_MASK = 2**64 - 1
_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_ROUNDS = 10

Integers = TypeVar("Integers", int, np.ndarray)  # one sample's integer, or int64 [B]


class Drawing(Protocol[Integers]):
    """What a sampler that also works in batches may draw: `Draw` is one, `Draws` the other."""

    def integer(self, low: Integers | int, high: Integers | int) -> Integers:
        """Uniform in {low, ..., high}, both ends included."""

    def ascending(self, low: Integers | int, high: Integers | int, count: int) -> list[Integers]:
        """`count` independent values of {low, ..., high}, sorted."""


class Draw:
    """One sample's integers, in order."""

    def __init__(self, seed: int, epoch: int, index: int, stream: int = PLANS):
        self._keys = _key_schedule(seed, stream)
        self._seed, self._stream, self._epoch, self._index = seed, stream, epoch, index
        self._used = 0  # words so far
        self._block: tuple[int, int, int, int] = (0, 0, 0, 0)

    def integer(self, low: int, high: int) -> int:
        """Uniform in {low, ..., high}, both ends included; off by at most (high - low) / 2**64."""
        at = self._used & 3
        if not at:
            self._block = self._philox((self._used >> 2) + 1)  # as in numpy, the first is number 1
        self._used += 1
        return low + (self._block[at] * (high - low + 1) >> 64)

    def ascending(self, low: int, high: int, count: int) -> list[int]:
        """`count` independent values of {low, ..., high}, sorted."""
        return sorted(self.integer(low, high) for _ in range(count))

    def different(self, below: int, count: int) -> list[int]:
        """`count` different integers in [0, below), in random order."""
        found: dict[int, None] = {}
        while len(found) < count:
            found[self.integer(0, below - 1)] = None
        return list(found)

    def integers(self, below: int, count: int) -> np.ndarray:
        """`count` values uniform in [0, below), int64."""
        block, at = divmod(self._used, 4)
        counter = np.array([block, 0, self._index, self._epoch], dtype=np.uint64)
        key = np.array([self._seed, self._stream], dtype=np.uint64)
        raw = np.random.Philox(key=key, counter=counter).random_raw(at + count)[at:]
        self._used += count
        if self._used & 3:
            self._block = self._philox((self._used >> 2) + 1)
        return _high_word(raw, np.uint64(below)).astype(np.int64)

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

    def _philox(self, block: int) -> tuple[int, int, int, int]:
        """In Python's integers: for four words quicker than building a numpy generator."""
        m0, m1 = _MULTIPLIERS
        c0, c1, c2, c3 = block, 0, self._index, self._epoch
        for k0, k1 in self._keys:
            p, q = m0 * c0, m1 * c2
            c0, c1, c2, c3 = q >> 64 ^ c1 ^ k0, q & _MASK, p >> 64 ^ c3 ^ k1, p & _MASK
        return c0, c1, c2, c3


class Draws:
    """The integers of B samples at once: row b has those of Draw(seed, epoch, indices[b])."""

    def __init__(self, seed: int, epoch: int, indices: np.ndarray, stream: int = PLANS):
        self._keys = _key_schedule(seed, stream)
        self._epoch, self._indices = epoch, np.asarray(indices, dtype=np.uint64)
        self._used = 0
        self._block: tuple[np.ndarray, ...] = ()

    def integer(self, low: np.ndarray | int, high: np.ndarray | int) -> np.ndarray:
        """Uniform in each row's {low, ..., high}, int64 [B]; low and high are int or int64 [B]."""
        at = self._used & 3
        if not at:
            self._block = philox(self._keys, self._used // 4 + 1, self._indices, self._epoch)
        self._used += 1
        span = np.asarray(high - low + 1).astype(np.uint64)
        return low + _high_word(self._block[at], span).view(np.int64)

    def ascending(self, low: np.ndarray | int, high: np.ndarray | int, count: int) -> list:
        """`count` arrays int64 [B] of independent values, sorted in each row."""
        return list(np.sort([self.integer(low, high) for _ in range(count)], axis=0))


def philox(keys, block: int, indices: np.ndarray, epoch: int) -> tuple[np.ndarray, ...]:
    """Four words, uint64 [B] each, at the counters (block, 0, indices[b], epoch)."""
    m0, m1 = map(np.uint64, _MULTIPLIERS)
    ones = np.ones_like(indices)
    c0, c1, c2, c3 = ones * np.uint64(block), 0 * ones, indices, ones * np.uint64(epoch)
    for k0, k1 in keys:
        high0, high1 = _high_word(c0, m0), _high_word(c2, m1)
        high1 ^= c1
        high1 ^= np.uint64(k0)
        high0 ^= c3
        high0 ^= np.uint64(k1)
        c0, c1, c2, c3 = high1, c2 * m1, high0, c0 * m0
    return c0, c1, c2, c3


def _high_word(a: np.ndarray, b) -> np.ndarray:
    """The upper 64 bits of the 128-bit product a * b, from four 64-bit products; uint64."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a1, a0, b1, b0 = a >> half, a & low, b >> half, b & low
    carry = a0 * b0
    carry >>= half
    middle = a1 * b0
    middle += carry
    rest = a0 * b1
    rest += middle & low
    rest >>= half
    middle >>= half
    a1 *= b1
    a1 += middle
    a1 += rest
    return a1


@lru_cache(maxsize=64)
def _key_schedule(seed: int, stream: int) -> tuple[tuple[int, int], ...]:
    w0, w1 = _WEYL
    return tuple(((seed + i * w0) & _MASK, (stream + i * w1) & _MASK) for i in range(_ROUNDS))
