"""Work shared by the data-parallel replicas of a model."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch.distributed as dist
from megatron.core import parallel_state

Unit = TypeVar("Unit")
Result = TypeVar("Result")


def replicas() -> int:
    return parallel_state.get_data_parallel_world_size()


def shared(units: Sequence[Unit], work: Callable[[Unit], Result]) -> Iterator[tuple[Unit, Result]]:
    """Each unit and what `work` makes of it, in order and on every rank, as they get done: as many
    at a time as there are replicas."""
    group = parallel_state.get_data_parallel_group()
    for start in range(0, len(units), group.size()):
        wave = units[start : start + group.size()]
        own = work(wave[group.rank()]) if group.rank() < len(wave) else None
        done = [own]
        if group.size() > 1:
            done = [None] * group.size()
            dist.all_gather_object(done, own, group)
        yield from zip(wave, done[: len(wave)], strict=True)


def batches(units: Sequence[Unit], size: int) -> list[Sequence[Unit]]:
    """`units` in order, `size` at a time."""
    return [units[start : start + size] for start in range(0, len(units), size)]
