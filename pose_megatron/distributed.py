"""Ranks: process groups, device, seeds, and who may print."""

import datetime
import functools
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from pose_megatron.flags import ParallelFlags
from pose_megatron.lifetime import end_with_parent
from pose_megatron.program import print_error


def initialize(parallel: ParallelFlags, seed: int, num_layers: int = 1) -> None:
    """Joins the job that torchrun started, or makes one of a single rank.

    Raises:
        ValueError: the environment names a rank without an address to meet at.
    """
    from megatron.core import parallel_state, tensor_parallel  # seconds: tools do without

    timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun is the parent
        end_with_parent(os.getppid())
    if dist.is_initialized():  # by a reader of checkpoints, in a job of one rank
        pass
    elif "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_size(num_layers),
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Team:
    """Processes that share a piece of work on the CPU: torchrun's, or this one alone."""

    def __init__(self):
        self.rank, self.size = rank(), world_size()
        if self.size > 1:
            dist.init_process_group("gloo")

    def share(self, value):
        """Rank 0's value, on every rank; they wait for each other."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value) -> list:
        """The values of all ranks, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


def print_rank_0(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


def one_sentence_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Ends a user's mistake in one sentence from one rank and exit code 1.

    What is not a user's mistake (anything but ValueError and OSError) keeps its traceback, unless
    another rank has failed before: then it is only the echo, such as a collective cut short.
    """

    @functools.wraps(main)
    def guarded() -> None:
        try:
            main()
        except Exception as error:
            first = _first_to_fail()
            if os.environ.get("POSE_TRACEBACK") or (
                    first and not isinstance(error, ValueError | OSError)):
                raise
            if first:
                print_error(_sentence(error))
            else:
                time.sleep(2)  # let the sentence out before torchrun ends the job
            os._exit(1)  # the other ranks may be inside a collective: nothing to wait for
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return guarded


def _sentence(error: Exception) -> str:
    """The message; of one that a loader process raised, what it said and not its traceback."""
    text = str(error).strip()
    return text.splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text


def _first_to_fail() -> bool:
    if world_size() == 1:
        return True
    if not dist.is_initialized():  # before the ranks have met all of them see the same mistake
        return rank() == 0
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add("pose_megatron/failed", 1) == 1
    except RuntimeError:  # the rank that keeps the store is gone already
        return False
