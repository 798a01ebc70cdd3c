"""This process as rank 0 of a job whose other ranks are not there."""

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed import fake_pg  # registers the backend "fake"

from pose_megatron.config.arguments import parse
from pose_megatron.runtime import distributed

assert fake_pg.FakeStore


@contextlib.contextmanager
def rank_zero(flags: list[str], world_size: int) -> Iterator[None]:
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

    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    with mock.patch.object(dist, "new_group", without_gloo), mock.patch.dict(os.environ, ranks):
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=world_size)
        try:
            distributed.initialize(args.training.seed, **args.parallel.sizes(args.model.num_layers))
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
