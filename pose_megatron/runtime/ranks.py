"""Which of torchrun's ranks this process is, and printing on rank 0 only."""

import os


def rank() -> int:
    """This process's rank; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many ranks torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def print_rank_0(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)
