"""Wilson's interval and what comes of it, against published and hand-made values."""

import pytest

from pose_megatron.evaluation.shares import effective_length, interval, wilson


@pytest.mark.parametrize(
    "found, trials, low, high",
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998)
    ],
)
def test_wilsons_interval(found, trials, low, high):
    answers = [[i < found] for i in range(trials)]
    assert interval(answers) == pytest.approx((low, high), abs=5e-5)


def test_answers_that_are_alike_in_a_haystack_count_less():
    """All eight of a haystack are found or none: as much as one answer each says."""
    alike = [[True] * 8, [False] * 8] * 10
    low, high = interval(alike)
    alone = interval([[True], [False]] * 10)
    assert low == pytest.approx(alone[0], abs=0.01) and high == pytest.approx(alone[1], abs=0.01)
    mixed = interval([[True, False] * 4] * 20)  # never more than so many independent ones
    assert mixed == pytest.approx(interval([[True], [False]] * 80))


def test_haystacks_with_unequal_numbers_of_answers_weigh_as_many():
    # by hand: 2 * (1 - 2/3)^2 + 1 * (0 - 2/3)^2 = 2/3, against 2/3 * 1/3: 3 answers are worth 1
    assert interval([[True, True], [False]]) == pytest.approx(wilson(2 / 3, 1))


def test_the_effective_length_is_where_all_up_to_it_hold():
    found = {16: 0.7, 4: 1.0, 8: 0.9, 32: 0.95}
    assert effective_length(found, 0.85) == 8 and effective_length(found, 0.7) == 32
    assert effective_length(found, 1.0) == 4 and effective_length({4: 0.5}, 0.85) == 0
