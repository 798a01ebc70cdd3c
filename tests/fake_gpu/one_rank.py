"""This process as one rank of a job whose other ranks are not there."""

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed import fake_pg  # registers the backend "fake"

from pose_megatron.config.arguments import parse
from pose_megatron.runtime import distributed
from tests.fake_gpu.environment import GPUS

assert fake_pg.FakeStore


class Names(dist.Store):
    """The store in which a group's first rank leaves the group's name, as NCCL wants it.

    Here nobody has left one: the first rank is not there, or it is this one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._left: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self._left[key] = value

    def get(self, key: str) -> bytes:
        return self._left.get(key, bytes(128))  # NCCL_UNIQUE_ID_BYTES

    def check(self, keys: list[str]) -> bool:
        return all(key in self._left for key in keys)


@contextlib.contextmanager
def one_rank(flags: list[str], world_size: int, rank: int) -> Iterator[None]:
    """Joins process groups: NCCL's are the fake driver's, and gloo's are torch's fake ones.

    Args:
        flags: of pretrain_pose.py, with the model's shape among them.
    """
    args = parse(flags, trains=False)
    new_group = dist.new_group

    def without_gloo(*args, **kwargs):
        if kwargs.get("backend") == "gloo":
            kwargs["backend"] = "fake"
        return new_group(*args, **kwargs)

    ranks = {"RANK": rank, "LOCAL_RANK": rank % GPUS, "WORLD_SIZE": world_size}
    variables = {name: str(value) for name, value in ranks.items()}
    names = Names()  # which torch holds without Python's part of it
    with mock.patch.object(dist, "new_group", without_gloo), mock.patch.dict(os.environ, variables):
        dist.init_process_group("nccl", store=names, rank=rank, world_size=world_size)
        try:
            distributed.initialize(args.training.seed, **args.parallel.sizes(args.model.num_layers))
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
