"""batch.py: every layout of data-parallel ranks trains on the same samples in the same steps."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pose_megatron.config.flags import DataFlags
from pose_megatron.data.batch import FIELDS, MicroBatchSampler, batches, fields_here, get_batch
from pose_megatron.data.dataset import build_datasets
from pose_megatron.positions.sampler import PoseSampler

layouts = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))


@given(layouts, st.integers(0, 6), st.integers(0, 8), st.integers(0, 50))
def test_a_step_trains_on_the_same_samples_in_every_layout(layout, done, steps, extra):
    ranks, micro, accumulated = layout
    size = ranks * micro * accumulated  # the global batch
    consumed, total = done * size, (done + steps) * size + extra % (ranks * micro)
    streams = [
        list(MicroBatchSampler(total, consumed, micro, rank, ranks)) for rank in range(ranks)
    ]
    for stream in streams:
        assert len(stream) == steps * accumulated and all(len(m) == micro for m in stream)
    for step in range(steps):
        here = [
            i
            for stream in streams
            for m in stream[step * accumulated : (step + 1) * accumulated]
            for i in m
        ]
        first = consumed + step * size
        assert sorted(here) == list(range(first, first + size))


@given(layouts, st.integers(0, 6), st.integers(1, 6))
def test_resuming_continues_the_stream(layout, done, more):
    ranks, micro, accumulated = layout
    size = ranks * micro * accumulated
    for rank in range(ranks):
        whole = list(MicroBatchSampler((done + more) * size, 0, micro, rank, ranks))
        rest = list(MicroBatchSampler((done + more) * size, done * size, micro, rank, ranks))
        assert whole[done * accumulated :] == rest


@pytest.fixture
def dataset(world, stdlib_corpus):
    data = DataFlags(data_path=[stdlib_corpus], split="1,0,0", seq_length=32)
    return build_datasets(data, PoseSampler(32, 512), 257, 12, 0)[0]


def test_a_batch_holds_the_samples_in_order(dataset):
    assert fields_here() == FIELDS
    stream = batches(dataset, consumed=4, micro_batch_size=2, num_workers=0)
    for step in range(4):
        batch = get_batch(stream, 2, 32)
        assert tuple(batch) == FIELDS
        for name, rows in batch.items():
            assert rows.dtype == torch.int64 and rows.shape == (2, 32)
            expected = np.stack([dataset[4 + 2 * step][name], dataset[5 + 2 * step][name]])
            assert (rows.numpy() == expected).all(), name
    with pytest.raises(ValueError, match="the dataset ended before --train-iters"):
        get_batch(stream, 2, 32)


def test_worker_processes_change_nothing(dataset):
    alone = list(batches(dataset, 0, 3, num_workers=0))
    worked = list(batches(dataset, 0, 3, num_workers=2))
    assert len(alone) == 4 and all(torch.equal(a, b) for a, b in zip(alone, worked, strict=True))


def test_a_rank_without_a_dataset_loads_nothing(world):
    assert batches(None, 0, 2, num_workers=0) is None
