"""shuffle.py: a permutation, mixed, and the same one for ever."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pose_megatron.data.shuffle import Shuffle


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 2000), st.integers(0, 2**64 - 1), st.integers(0, 100))
def test_shuffle_is_a_permutation(n, seed, epoch):
    shuffle = Shuffle(n, seed, epoch)
    assert sorted(shuffle[i] for i in range(n)) == list(range(n))


def test_shuffle_mixes_and_differs_by_seed_and_epoch():
    n = 1000
    orders = [
        [Shuffle(n, seed, epoch)[i] for i in range(n)] for seed, epoch in ((1, 0), (1, 1), (2, 0))
    ]
    for order in orders:
        # A random order has on average one fixed point and one pair of neighbours kept.
        assert sum(x == i for i, x in enumerate(order)) < 8
        assert sum(b - a == 1 for a, b in pairwise(order)) < 8
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert sum(a == b for a, b in zip(orders[one], orders[other], strict=True)) < 8


def test_shuffle_covers_a_corpus_that_no_table_would_fit():
    shuffle = Shuffle(10**15, 7, 0)
    seen = [shuffle[i] for i in range(2000)]
    assert len(set(seen)) == 2000 and max(seen) < 10**15
    assert 0.45 < np.mean(seen) / 10**15 < 0.55


@pytest.mark.parametrize(
    "n, seed, epoch, first, last",
    [
        (1000, 1234, 0, [443, 327, 296, 905, 576, 425, 803, 307], 323),
        (1, 5, 0, [0], 0),
        (2, 5, 1, [0, 1], 1),
        (10**6 + 3, 7, 2, [54463, 712488, 611040, 292660, 101971, 677293, 171492, 815653], 420376),
        (
            10**15,
            7,
            0,
            [95166269047410, 761734670760248, 433718208156774, 698902296414997],
            629838569722312,
        ),
    ],
)
def test_golden_orders_never_change(n, seed, epoch, first, last):
    # Written down once: a change here changes the data of every run that someone may resume.
    shuffle = Shuffle(n, seed, epoch)
    assert [shuffle[i] for i in range(len(first))] == first and shuffle[n - 1] == last


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32), st.data())
def test_a_stretch_is_the_elements_one_by_one(n, seed, data):
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start, n))
    shuffle = Shuffle(n, seed, 3)
    assert shuffle.order(start, stop).tolist() == [shuffle[i] for i in range(start, stop)]


@settings(deadline=None)
@given(
    st.integers(1, 3000), st.lists(st.tuples(st.integers(0, 2999), st.integers(1, 40)), max_size=12)
)
def test_any_way_of_reading_gives_the_same_order(n, stretches):
    shuffle = Shuffle(n, 5, 1)
    order = Shuffle(n, 5, 1).order(0, n).tolist()
    for start, length in stretches:
        for i in range(min(start, n - 1), min(start + length, n)):
            assert shuffle[i] == order[i]


def test_streams_have_nothing_in_common():
    one, other = (Shuffle(1000, 1, 0, stream).order(0, 1000) for stream in (0, 1))
    assert (one == other).sum() < 8
