"""How the ranks of one attempt of torchrun meet, and no rank of another attempt.

With --max-restarts, torchrun (of torch 2.13) keeps one store for all attempts of a job. What a rank
of the first attempt wrote into it, such as where it listens, a rank of the second one would take
for its own peer's, and wait for ever. So the ranks first agree on a name for their attempt, and
then write everything under it:

    rank 0                                      every rank
    sets "attempt" to a name of its own         reads it, sets NAME/RANK to a token of its own
    sets NAME/ranks to the tokens of all        finds its token in NAME/ranks: this is its attempt

A rank that has read the name of an attempt before finds that nobody answers, or that its token is
missing, and reads "attempt" again. The number that torchrun gives an attempt would not do:
TORCHELASTIC_RESTART_COUNT counts the restarts of one node, and starts anew where one is replaced.
"""

import datetime
import time
import uuid

import torch.distributed as dist

_ATTEMPT, _POLL = "pose_megatron/attempt", 0.05  # seconds


def join(backend: str, timeout: datetime.timedelta = dist.default_pg_timeout) -> None:
    """Makes the ranks of this attempt torch's default process group; arguments as `meet`."""
    store, rank, ranks = meet(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)


def meet(timeout: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """A store of this attempt's ranks alone, this rank, and how many there are.

    Args:
        timeout: how long the ranks wait for each other, here and in every collective.

    Raises:
        TimeoutError: not all ranks came.
        ValueError: the environment does not say where to meet.
    """
    store, rank, ranks = next(iter(dist.rendezvous("env://", timeout=timeout)))
    name = _agree(store, rank, ranks, time.monotonic() + timeout.total_seconds())
    return dist.PrefixStore(name, store), rank, ranks


def _agree(store: dist.Store, rank: int, ranks: int, end: float) -> str:
    """The name of the attempt."""
    own, token = f"pose_megatron/{uuid.uuid4().hex}", uuid.uuid4().hex[:16]
    while time.monotonic() < end:
        if rank == 0:
            store.set(_ATTEMPT, own)  # each time: a rank 0 that is about to end may still write
        name = own
        if rank and store.check([_ATTEMPT]):
            name = store.get(_ATTEMPT).decode()
        store.set(f"{name}/{rank}", token)
        if rank == 0:
            keys = [f"{name}/{other}" for other in range(ranks)]
            if store.check(keys):
                store.set(f"{name}/ranks", " ".join(map(bytes.decode, store.multi_get(keys))))
        if store.check([f"{name}/ranks"]) and token in store.get(f"{name}/ranks").decode():
            return name
        time.sleep(_POLL)
    raise TimeoutError(f"not all of {ranks} ranks have come to rank {rank} in time")
