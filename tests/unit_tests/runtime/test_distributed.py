"""Ranks and their GPUs."""

import pytest

from pose_megatron.errors import ConfigError
from pose_megatron.runtime.distributed import local_rank


@pytest.mark.parametrize(
    ("environment", "gpu"),
    [({}, 0), ({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}, 1), ({"LOCAL_RANK": "3"}, 3)],
)
def test_a_rank_takes_the_gpu_of_its_number_on_the_node(monkeypatch, environment, gpu):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert local_rank() == gpu


def test_ranks_that_would_all_take_gpu_0_are_refused(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 8 and LOCAL_RANK is missing"):
        local_rank()
