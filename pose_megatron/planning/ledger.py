"""Who holds how much of a GPU's memory: now, and at the fullest moment."""

import weakref
from collections import Counter
from collections.abc import Iterable

import torch

BLOCK = 512  # bytes: CUDA's caching allocator hands out multiples of it


class Ledger:
    """The bytes of live tensors by part of a model's memory, counted as CUDA's allocator does.

    Attributes:
        held: {part: bytes} now.
        fullest: the same when their sum was highest since `restart`.
    """

    def __init__(self):
        self.held: Counter[str] = Counter()
        self.fullest: dict[str, int] = {}
        self._now = self._most = 0
        self._live: dict[int, tuple[str, int]] = {}  # storage -> (part, bytes)

    def enter(self, storage: torch.UntypedStorage, part: str) -> None:
        """Counts a storage under `part`; one that is known keeps its part, at its present size."""
        key = storage._cdata
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        if key not in self._live:
            weakref.finalize(storage, self._leave, key).atexit = False
        elif self._live[key][1] == size:
            return
        else:
            part = self._live[key][0]
        self._set(key, part, size)
        if self._now > self._most:
            self._most, self.fullest = self._now, dict(self.held)

    def move(self, tensors: Iterable[torch.Tensor], part: str) -> None:
        """Puts live tensors under another part."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._live:
                self._set(key, part, self._live[key][1])

    def restart(self) -> None:
        """Looks for the fullest moment from now on."""
        self._most, self.fullest = self._now, dict(self.held)

    def _set(self, key: int, part: str, size: int) -> None:
        self._remove(key)
        self._live[key] = (part, size)
        self.held[part] += size
        self._now += size

    def _remove(self, key: int) -> None:
        part, size = self._live.get(key, ("", 0))
        self.held[part] -= size
        self._now -= size

    def _leave(self, key: int) -> None:
        self._remove(key)
        del self._live[key]
