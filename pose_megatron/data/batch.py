"""One micro-batch on every rank.

Tensor-parallel rank 0 of each pipeline stage loads the micro-batch; one broadcast hands it to the
rest of its group, so that all of them hold the same numbers; then the sequence is sliced once for
context parallelism. Position ids go to every stage: each one rotates queries and keys.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pose_megatron.data.dataset import TrainingSet
from pose_megatron.errors import ConfigError
from pose_megatron.runtime.device import device
from pose_megatron.runtime.processes import leave_signals_to_parent

FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


def fields_here(vp_stage: int | None = None) -> tuple[str, ...]:
    """The fields that this pipeline stage needs: a middle one only position ids.

    Args:
        vp_stage: one model chunk of an interleaved stage; None for all that the rank has.
    """
    here = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    p = parallel_state
    ends = p.is_pipeline_first_stage(**here) or p.is_pipeline_last_stage(**here)
    return FIELDS if ends else ("position_ids",)


class MicroBatchSampler:
    """Sample indices of this data-parallel rank's micro-batches, in order.

    Step i trains on samples [i * G, (i + 1) * G) with the global batch size G: the same set for any
    number of ranks and any micro-batch size.

    Args:
        total, consumed: samples of the dataset, and how many of them are done.
        micro: micro-batch size.
        rank, ranks: this data-parallel rank, and how many there are.
    """

    def __init__(self, total: int, consumed: int, micro: int, rank: int, ranks: int):
        self.total, self.consumed, self.micro = total, consumed, micro
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        block = self.micro * self.ranks
        first = self.consumed + self.rank * self.micro
        for start in range(first, self.total - (block - self.rank * self.micro) + 1, block):
            yield list(range(start, start + self.micro))


def _collate(samples: list[dict[str, np.ndarray]]) -> torch.Tensor:
    """b samples, each with f fields of L values, as int64 [f, b, L], in the order of FIELDS."""
    fields = [name for name in FIELDS if name in samples[0]]
    # The loss mask is float32, as megatron-core's is; it holds zeros and ones.
    rows = [[s[name].astype(np.int64, copy=False) for s in samples] for name in fields]
    return torch.from_numpy(np.stack(rows))


def batches(
    dataset: TrainingSet | None, consumed: int, micro_batch_size: int, num_workers: int
) -> Iterator[torch.Tensor] | None:
    """This data-parallel rank's micro-batches [f, b, L]; None where the rank does not load."""
    if dataset is None:
        return None
    sampler = MicroBatchSampler(
        len(dataset),
        consumed,
        micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_collate,
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def get_batch(
    iterator: Iterator[torch.Tensor] | None, micro_batch_size: int, seq_length: int
) -> dict[str, torch.Tensor | None]:
    """The next micro-batch on this rank: each of FIELDS as int64 [b, L / cp], or None where this
    pipeline stage does not need it.

    Raises:
        ConfigError: the dataset has too few samples.
    """
    fields = fields_here()
    shape = (len(fields), micro_batch_size, seq_length)
    packed = None
    if iterator is not None:
        packed = next(iterator, None)
        if packed is None:
            raise ConfigError("the dataset ended before --train-iters: it has too few samples")
        assert packed.shape == shape, f"{tuple(packed.shape)} loaded, {shape} expected"
        packed = packed.to(device(), non_blocking=True)
    return distribute(packed, fields, shape)


def distribute(
    packed: torch.Tensor | None, fields: tuple[str, ...], shape: tuple[int, int, int]
) -> dict[str, torch.Tensor | None]:
    """A micro-batch from tensor-parallel rank 0 to its whole group, sliced for context parallelism.

    Args:
        packed: int64 [f, b, L] on this rank's device, in the order of `fields`; None where the rank
            does not load.
        shape: (f, b, L).

    Returns:
        Each of FIELDS as int64 [b, L / cp], or None where it is not among `fields`.
    """
    if packed is None:
        packed = torch.empty(shape, dtype=torch.int64, device=device())
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.broadcast(
            packed,
            parallel_state.get_tensor_model_parallel_src_rank(),
            group=parallel_state.get_tensor_model_parallel_group(),
        )
    batch = dict(zip(fields, slice_for_context_parallelism(packed), strict=True))
    return {name: batch.get(name) for name in FIELDS}


def slice_for_context_parallelism(rows: torch.Tensor) -> torch.Tensor:
    """[..., L] -> [..., L / n]: chunks r and 2n-1-r of 2n on rank r of n, megatron-core's zigzag.

    megatron-core has a function for it, with another signature in every release.
    """
    n = parallel_state.get_context_parallel_world_size()
    if n == 1:
        return rows
    r = parallel_state.get_context_parallel_rank()
    chunks = rows.chunk(2 * n, dim=-1)
    return torch.cat([chunks[r], chunks[2 * n - 1 - r]], dim=-1)
