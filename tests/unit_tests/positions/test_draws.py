"""draws.py against Philox written out in Python's integers, whatever numpy does."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pose_megatron.positions.draws import Draw, Draws

WORD = 2**64


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """One block of Philox4x64-10 as Salmon et al. (2011) define it, in Python's integers."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, WORD)
        high1, low1 = divmod(0xCA5A826395121157 * c2, WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % WORD, (k1 + 0xBB67AE8584CAA73B) % WORD
    return [c0, c1, c2, c3]


def stream(seed: int, epoch: int, index: int, kind: int = 0):
    """The words of a sample. numpy counts a block before it makes it: the first is number 1."""
    for block in itertools.count(1):
        yield from philox((seed, kind), (block, 0, index, epoch))


@pytest.mark.parametrize(
    "key, counter, block",
    [
        # Known answers that the authors of Philox publish with Random123.
        (
            (0, 0),
            (0, 0, 0, 0),
            "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b",
        ),
        (
            (WORD - 1,) * 2,
            (WORD - 1,) * 4,
            "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0",
        ),
        (
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
        ),
    ],
)
def test_the_philox_of_this_file_gives_the_published_answers(key, counter, block):
    assert [f"{word:016x}" for word in philox(key, counter)] == block.split()


addresses = st.tuples(st.integers(0, WORD - 1), st.integers(0, 2**32), st.integers(0, 2**48))


@settings(deadline=None)
@given(addresses, st.integers(-(10**6), 10**6), st.integers(0, 2**62))
def test_integer_is_the_top_of_a_philox_word(address, low, span):
    draw, words = Draw(*address), stream(*address)
    for _ in range(6):
        assert draw.integer(low, low + span) == low + (next(words) * (span + 1) >> 64)


@settings(deadline=None)
@given(addresses, st.integers(1, 2**32 - 1), st.integers(1, 30))
def test_integers_is_exact_128_bit_arithmetic(address, below, count):
    expected = [word * below >> 64 for word in itertools.islice(stream(*address), count)]
    drawn = Draw(*address).integers(below, count)
    assert drawn.tolist() == expected and drawn.dtype == np.int64


@settings(deadline=None)
@given(
    st.integers(0, WORD - 1),
    st.integers(0, 2**32),
    st.integers(0, 2),
    st.lists(st.integers(0, 2**48), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(-(10**6), 10**6), st.integers(0, 2**62)), max_size=9),
)
def test_a_batch_of_draws_is_that_stream_in_every_row(seed, epoch, kind, indices, ranges):
    draws = Draws(seed, epoch, np.array(indices), kind)
    rows = [stream(seed, epoch, index, kind) for index in indices]
    for low, span in ranges:
        assert draws.integer(low, low + span).tolist() == [
            low + (next(row) * (span + 1) >> 64) for row in rows
        ]


@settings(deadline=None)
@given(addresses, st.lists(st.integers(0, 9), max_size=8))
def test_single_and_bulk_draws_share_one_stream(address, counts):
    draw, words = Draw(*address), stream(*address)
    for count in counts:
        if count:
            assert draw.integers(2**20, count).tolist() == [
                next(words) * 2**20 >> 64 for _ in range(count)
            ]
        else:
            assert draw.integer(0, 2**20 - 1) == next(words) * 2**20 >> 64
