"""Orders without tables: a pseudo-random permutation of [0, n) that is computed, not stored."""

import numpy as np

from pose_megatron.positions.draws import SAMPLES, SHUFFLES


class Shuffle:
    """A Feistel network over a power of four, walked in cycles until it lands below n (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        n: at least 1, below 2**62.
        seed, epoch: each pair has an order of its own.
        order: SAMPLES or DOCUMENTS of positions/draws.py: the two have nothing in common.
    """

    ROUNDS = 6
    BLOCK = 512  # elements computed ahead for a reader that goes one by one
    PATIENCE = 8  # elements in a row after which a reader counts as one

    def __init__(self, n: int, seed: int, epoch: int, order: int = SAMPLES):
        self.n = n
        self._half = max((max(n - 1, 1).bit_length() + 1) // 2, 1)
        self._mask = (1 << self._half) - 1
        key = np.array([seed, SHUFFLES], dtype=np.uint64)
        counter = np.array([0, 0, order, epoch], dtype=np.uint64)
        raw = np.random.Philox(key=key, counter=counter).random_raw(self.ROUNDS)
        self._keys = [int(k) for k in raw]
        self._start = 0
        self._block: list[int] = []  # elements computed ahead, from `_start` on
        self._next, self._in_a_row = 0, 0

    def __getitem__(self, i: int) -> int:
        at = i - self._start
        if 0 <= at < len(self._block):
            return self._block[at]
        self._in_a_row = self._in_a_row + 1 if i == self._next else 0
        self._next = i + 1
        if self._in_a_row >= self.PATIENCE:
            self._start, self._block = i, self.order(i, min(i + self.BLOCK, self.n)).tolist()
            self._next = i + len(self._block)
            return self._block[0]
        value = self._permute(i)
        while value >= self.n:
            value = self._permute(value)
        return value

    def order(self, start: int, stop: int) -> np.ndarray:
        """Elements start to stop - 1 of the permutation, int64."""
        values = self._permute(np.arange(start, stop, dtype=np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while len(outside):
            values[outside] = self._permute(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64)

    def _permute(self, values):
        """One step of the walk, for an int or for uint64 of any shape."""
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return left << self._half | right


def _mix(x):
    """splitmix64's finaliser (Steele et al., 2014)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31
