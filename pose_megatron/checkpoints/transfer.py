"""Moves tensors from a reader, one ahead of its user, and looks at their bits."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from pose_megatron.checkpoints.formats import CheckpointReader
from pose_megatron.checkpoints.mapping import ParamMapping
from pose_megatron.checkpoints.tensor_files import size


def read_ahead(
    reader: CheckpointReader,
    mappings: Iterable[ParamMapping],
    dtypes: Mapping[str, torch.dtype],
    inspect: Callable[[ParamMapping, Tensor], None] = lambda mapping, tensor: None,
    buffers: int = 2,
) -> Iterator[tuple[ParamMapping, Tensor]]:
    """Megatron's tensors in `dtypes`; the next one is read while the caller works on this one.

    A tensor is the caller's until it asks for the next one.

    Args:
        inspect: called with each tensor.
        buffers: how many, each of the largest tensor's size. With one, nothing is read ahead.
    """
    mappings = list(mappings)
    largest = max(size(reader.dtypes[mapping.name], mapping.shape) for mapping in mappings)
    free: queue.Queue[Tensor | None] = queue.Queue()
    ready: queue.Queue[tuple[ParamMapping, Tensor, Tensor] | BaseException] = queue.Queue()
    for _ in range(buffers):  # used again and again: fresh memory costs as much as reading does
        free.put(torch.empty(largest, dtype=torch.uint8))

    def produce() -> None:
        try:
            for mapping in mappings:
                if (buffer := free.get()) is None:
                    return
                dtype = reader.dtypes[mapping.name]
                out = buffer[: size(dtype, mapping.shape)].view(dtype).view(mapping.shape)
                tensor = reader.read(mapping, out).to(dtypes[mapping.name])
                inspect(mapping, tensor)
                ready.put((mapping, tensor, buffer))
        except BaseException as error:  # raised where the caller waits
            ready.put(error)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        for _ in mappings:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            mapping, tensor, buffer = item
            yield mapping, tensor
            free.put(buffer)
    finally:
        free.put(None)
        thread.join()


def total_bytes(mappings: Iterable[ParamMapping], dtypes: Mapping[str, torch.dtype]) -> int:
    """Bytes of Megatron's tensors, vocabulary padding included."""
    return sum(size(dtypes[mapping.name], mapping.shape) for mapping in mappings)


def differing(one: Tensor, other: Tensor) -> bool:
    """Whether a bit or the dtype differs; NaN equals a NaN of the same bits."""
    return one.dtype != other.dtype or not torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def count_nonfinite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    wide = torch.float32 if tensor.dtype == torch.float16 else tensor.dtype
    if torch.isfinite(tensor.sum(dtype=wide)):
        return 0
    return int((~torch.isfinite(tensor)).sum())
