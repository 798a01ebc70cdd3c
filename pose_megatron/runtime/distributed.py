"""Process groups and seeds of the ranks that run together."""

import datetime
import os
import random

import numpy as np
import torch
import torch.distributed as dist

from pose_megatron.runtime.attempts import join
from pose_megatron.runtime.device import local_rank
from pose_megatron.runtime.processes import end_with_parent
from pose_megatron.runtime.ranks import rank, world_size


def initialize(
    seed: int = 1234,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    timeout_minutes: int = 10,
) -> None:
    """Joins the ranks that torchrun started, or sets up a single one.

    Args:
        seed: for all random generators. Python's and numpy's decide nothing, but are saved with a
            run, and two equal runs save the same.
        timeout_minutes: how long a collective may take.

    Raises:
        ValueError: the environment has RANK but no MASTER_ADDR to meet at.
        ConfigError: as `local_rank`, where there are GPUs.
    """
    from megatron.core import (  # takes seconds, and not every tool needs it
        parallel_state,
        tensor_parallel,
    )

    timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun is the parent
        end_with_parent(os.getppid())
    if not dist.is_initialized():  # else by a checkpoint reader, with a single rank
        if "RANK" in os.environ:
            join(backend, timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if backend == "nccl":
            # It learns which GPU is this rank's; a barrier would guess that from the rank's number.
            dist.all_reduce(torch.zeros(1, device="cuda"))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


class CpuGroup:
    """The ranks that torchrun started, or this process alone, as a process group over gloo."""

    def __init__(self):
        self.rank, self.size = rank(), world_size()
        if self.size > 1:
            if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun is the parent
                end_with_parent(os.getppid())
            join("gloo")

    def broadcast(self, value):
        """Rank 0's value, on every rank; the ranks wait for each other."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value) -> list:
        """Every rank's value, in order, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values
