"""The ranks of an attempt agree on its name in a store that has the words of attempts before."""

import datetime
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from pose_megatron.runtime import attempts


def names(store, ranks):
    """What each rank takes for the attempt's name; every rank is a thread with the same store."""
    end = time.monotonic() + 20
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(lambda rank: attempts._agree(store, rank, ranks, end), range(ranks)))


@pytest.mark.parametrize("before", ["nothing", "whole", "half", "no answer"])
def test_each_attempt_has_a_name_of_its_own(before):
    store, old = dist.HashStore(), "old"
    if before == "whole":
        (old,) = set(names(store, 4))
    elif before != "nothing":
        store.set("pose_megatron/attempt", old)
        store.set("old/1", "0123456789abcdef")
        if before == "half":
            store.set("old/ranks", "0123456789abcdef fedcba9876543210")
    (name,) = set(names(store, 4))
    assert name != old


def test_a_rank_that_does_not_come_is_not_awaited_for_ever(monkeypatch):
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 1, 2)]))
    with pytest.raises(TimeoutError, match="not all of 2 ranks"):
        attempts.meet(datetime.timedelta(seconds=0.2))
