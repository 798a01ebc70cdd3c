"""Orders without tables: a pseudo-random permutation of [0, n) that is computed, not stored."""

import numpy as np


class Shuffle:
    """A Feistel network over a power of four, walked in cycles until it lands below n (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        n: at least 1, below 2**62.
        seed, epoch: of the order.
        stream: orders of different streams have nothing in common.
    """

    ROUNDS = 6
    BLOCK = 512  # neighbours computed together when one is asked for

    def __init__(self, n: int, seed: int, epoch: int, stream: int = 0):
        self.n = n
        half = max((max(n - 1, 1).bit_length() + 1) // 2, 1)
        self._half, self._mask = np.uint64(half), np.uint64((1 << half) - 1)
        key = np.array([seed, 1], dtype=np.uint64)  # plans use word 0: another stream
        counter = np.array([0, 0, stream, epoch], dtype=np.uint64)
        self._keys = np.random.Philox(key=key, counter=counter).random_raw(self.ROUNDS)
        self._block: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, i: int) -> int:
        number, at = divmod(i, self.BLOCK)
        if number != self._block[0]:
            start = number * self.BLOCK
            self._block = number, self.order(start, min(start + self.BLOCK, self.n)).tolist()
        return self._block[1][at]

    def order(self, start: int, stop: int) -> np.ndarray:
        """Elements start to stop - 1 of the permutation, int64."""
        values = self._permute(np.arange(start, stop, dtype=np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while len(outside):
            values[outside] = self._permute(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64)

    def _permute(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return left << self._half | right


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al., 2014)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
