"""Which process this is among those that torchrun started, and which of them speaks."""

import os


def rank() -> int:
    """0 where torchrun started nothing."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def print_rank_0(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)
