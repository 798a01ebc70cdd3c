"""Verdicts, against published quantiles and intervals."""

import math

import pytest

from pose_megatron.evaluation.claims import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Interval,
    at_most,
    difference_of_shares,
    mean_of,
    student,
)
from pose_megatron.evaluation.shares import wilson


@pytest.mark.parametrize(
    ("degrees", "quantile"),  # any table of Student's t
    [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_students_quantiles(degrees, quantile):
    assert student(degrees) == pytest.approx(quantile, abs=6e-4)


def test_the_mean_of_some_values():
    found = mean_of([1.0, 2.0, 6.0])  # by hand: mean 3, s = sqrt(7), half = 4.3027 * sqrt(7 / 3)
    assert found.mean == 3 and found.n == 3
    half = 4.3027 * math.sqrt(7 / 3)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), abs=1e-3)
    assert mean_of([4.0]) == Interval(4.0, -math.inf, math.inf, 1)
    assert -mean_of([4.0, 5.0]) == mean_of([-4.0, -5.0])


@pytest.mark.parametrize(
    ("a", "m", "b", "n", "low", "high"),  # Newcombe (1998), table II, method 10
    [(56, 70, 48, 80, 0.0524, 0.3339), (9, 10, 3, 10, 0.1705, 0.8090), (10, 10, 0, 10, 0.6075, 1)],
)
def test_the_difference_of_two_shares(a, m, b, n, low, high):
    one, other = (Interval(k / of, *wilson(k / of, of), of) for k, of in ((a, m), (b, n)))
    found = difference_of_shares(one, other)
    assert found.mean == pytest.approx(a / m - b / n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-5)


def test_a_claim_is_decided_by_the_whole_interval():
    def verdict(low, high):
        return at_most("a", Interval((low + high) / 2, low, high, 3), 0.05, "b").verdict

    assert verdict(-1, 0.05) == HOLDS
    assert verdict(0.06, 1) == FAILS
    assert verdict(0.05, 1) == verdict(-1, 0.06) == verdict(-math.inf, math.inf) == UNDECIDED
