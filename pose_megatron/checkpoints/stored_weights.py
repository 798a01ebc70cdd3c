"""The weights of a checkpoint as they are stored: one interface over every layout of files."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor


class StoredWeights(Mapping[str, Tensor]):
    """Tensors by the names a checkpoint stores them by; each is read from disk when asked for.

    Attributes:
        shapes, dtypes: by name, known without reading.
        hashes: (algorithm, digest) of those files that came with one.
        warnings: what is odd but harmless, in sentences.
    """

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.hashes: dict[Path, tuple[str, str]] = {}
        self.warnings: list[str] = []

    @abstractmethod
    def read(self, name: str, pieces: Sequence[Tensor]) -> None:
        """Fills contiguous pieces with the tensor's rows, one piece after the other.

        Raises:
            DamagedCheckpoint: a file is cut off or damaged.
        """

    def verify(self) -> None:
        """Reads everything that is stored, the weights and what else has a checksum.

        Raises:
            DamagedCheckpoint: a file is cut off or damaged.
        """
        for name in self:
            self[name]

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        self.read(name, [tensor])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
