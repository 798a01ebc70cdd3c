"""samplers.py against the laws it states, by exact probabilities on tiny windows."""

import itertools
import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pose_megatron.positions.sampler import PoseSampler


def misfit(seen: Counter, law: dict) -> float:
    """Standard deviations between a sample and the law, by Pearson's chi-square."""
    total = sum(seen.values())
    assert set(seen) <= set(law), set(seen) - set(law)
    assert sum(law.values()) == 1
    expected = {key: float(total * p) for key, p in law.items()}
    assert min(expected.values()) > 5
    chi2 = sum((seen[key] - e) ** 2 / e for key, e in expected.items())
    degrees = len(law) - 1
    return (chi2 - degrees) / (2 * degrees) ** 0.5


def chain_law(count: int, room: int) -> dict[tuple, Fraction]:
    """x_0 = 0, x_i uniform in {x_{i-1}, ..., room}."""
    law = {(0,): Fraction(1)}
    for _ in range(count - 1):
        law = {
            (*x, y): p / (room - x[-1] + 1) for x, p in law.items() for y in range(x[-1], room + 1)
        }
    return law


def stick_law(count: int, window: int) -> dict[tuple, Fraction]:
    """Each length uniform in {1, ..., what leaves one token for every later chunk}."""
    law = {(): Fraction(1)}
    for later in range(count - 1, 0, -1):
        law = {
            (*x, y): p / (window - sum(x) - later)
            for x, p in law.items()
            for y in range(1, window - sum(x) - later + 1)
        }
    return {(*x, window - sum(x)): p for x, p in law.items()}


def observe(sampler, source, addresses):
    """Counts (lengths, u, v): the skips of equations 4 and 5, without what precedes a chunk."""
    seen = Counter()
    for seed, epoch, index in addresses:
        plan = PoseSampler(
            sampler.window, sampler.target, sampler.name, sampler.num_chunks, sampler.content, seed
        ).plan(index, source, epoch)
        starts = np.cumsum(plan.lengths) - plan.lengths
        seen[
            tuple(plan.lengths.tolist()),
            tuple((plan.position_starts - starts).tolist()),
            tuple((plan.text_starts - starts).tolist()),
        ] += 1
    return seen


@pytest.mark.parametrize("walk", ["index", "epoch", "seed"])
def test_uniform_content_has_the_papers_joint_law(walk):
    window, target, source, chunks = 5, 7, 6, 3
    sticks, u, v = stick_law(chunks, window), chain_law(chunks, 2), chain_law(chunks, 1)
    law = {
        (a, b, c): p * q * r
        for (a, p), (b, q), (c, r) in itertools.product(sticks.items(), u.items(), v.items())
    }
    addresses = [
        {"index": (7, 3, i), "epoch": (7, i, 3), "seed": (i, 7, 3)}[walk] for i in range(12000)
    ]
    seen = observe(PoseSampler(window, target, num_chunks=chunks), source, addresses)
    assert abs(misfit(seen, law)) < 4


@pytest.mark.parametrize("source, room", [(30, 4), (7, 2)])
def test_aligned_content_is_bounded_by_the_shorter_of_target_and_source(source, room):
    sampler = PoseSampler(5, 9, num_chunks=3, content="aligned")
    law = {
        (a, b, b): p * q
        for (a, p), (b, q) in itertools.product(stick_law(3, 5).items(), chain_law(3, room).items())
    }
    seen = observe(sampler, source, [(5, 0, i) for i in range(12000)])
    assert abs(misfit(seen, law)) < 4


def test_two_chunks_are_cut_uniformly_and_skip_uniformly():
    # Equations 3 and 4 for N = 2 read off: every cut 1..L-1, every u_1 in 0..T-L, equally likely.
    window, target = 9, 14
    law = {(cut, u): Fraction(1, 8 * 6) for cut in range(1, 9) for u in range(6)}
    sampler = PoseSampler(window, target, content="contiguous")
    plans = [sampler.plan(i, window) for i in range(12000)]
    seen = Counter((int(p.lengths[0]), int(p.position_starts[1] - p.lengths[0])) for p in plans)
    assert abs(misfit(seen, law)) < 4


@pytest.mark.parametrize("window, target", [(1, 6), (2, 7), (3, 6), (4, 6), (5, 6)])
def test_randpos_draws_every_subset_equally_often(window, target):
    subsets = list(itertools.combinations(range(target), window))
    law = {subset: Fraction(1, len(subsets)) for subset in subsets}
    sampler = PoseSampler(window, target, "randpos")
    seen = Counter(tuple(sampler.plan(i, window).positions().tolist()) for i in range(6000))
    assert abs(misfit(seen, law)) < 4


@settings(deadline=None)
@given(st.integers(1, 80), st.integers(0, 2**20), st.integers(0, 2**40))
def test_randpos_keeps_the_text_contiguous(window, reach, index):
    plan = PoseSampler(window, window + reach, "randpos").plan(index, window)
    assert plan.text().tolist() == list(range(window)) and plan.runs() == [(0, window)]
    if not reach:
        assert plan.positions().tolist() == list(range(window))


def laws(sampler, source, tokens=None, count=12000) -> Counter:
    """Positions and text of many samples, each as tuples."""
    plans = (sampler.plan(i, source, 0, tokens) for i in range(count))
    return Counter((tuple(p.positions().tolist()), tuple(p.text().tolist())) for p in plans)


def expand(cuts, skips):
    """Window indices with what each chunk skips added."""
    return tuple(i + skips[sum(cut <= i for cut in cuts[1:-1])] for i in range(cuts[-1]))


def merge(*terms) -> dict[tuple, Fraction]:
    """A law from (outcome, probability) pairs, some of them of the same outcome."""
    law = Counter()
    for outcome, p in terms:
        law[outcome] += p
    return dict(law)


def test_sorted_uniform_skips_are_order_statistics():
    window, target, chunks = 4, 7, 3
    law = merge(
        *(
            ((tuple(expand([0, a, a + b, window], [0, *sorted(u)])), tuple(range(window))), p / 16)
            for (a, b, _), p in stick_law(chunks, window).items()
            for u in itertools.product(range(4), repeat=2)
        )
    )
    sampler = PoseSampler(
        window, target, num_chunks=chunks, content="contiguous", skip_law="sorted-uniform"
    )
    assert abs(misfit(laws(sampler, window), law)) < 4


def test_pose_reference_has_the_law_of_the_authors_code():
    # rt1 in 1..(len+1)//2, rt2 in len..Lx, position skip in 0..T-len, documents cut at 5 windows.
    window, target = 5, 8
    for source, reach in ((7, 7), (1000, 25)):
        law = {}
        for rt1 in range(1, 4):
            for rt2 in range(window, reach + 1):
                text = (*range(rt1), *range(rt2 - (window - rt1), rt2))
                for skip in range(target - window + 1):
                    key = expand([0, rt1, window], [0, skip]), text
                    law[key] = law.get(key, 0) + Fraction(1, 3 * (reach - window + 1) * 4)
        seen = laws(PoseSampler(window, target, "pose-reference"), source)
        assert abs(misfit(seen, law)) < 4


def test_pose_boundary_cuts_only_after_its_tokens_and_any_as_often():
    tokens = np.array([7, 9, 7, 1, 2, 2, 7])  # may cut at 1, 2 and 3; the last one cuts nothing
    window, target = 7, 9
    law = merge(
        *(
            ((expand([0, *cuts, window], skips), tuple(range(window))), p / 3)
            for cuts in itertools.combinations((1, 2, 3), 2)
            for skips, p in chain_law(3, 2).items()
        )
    )
    sampler = PoseSampler(window, target, "pose-boundary", num_chunks=3, boundaries=(7, 9, 1000))
    assert abs(misfit(laws(sampler, 50, tokens), law)) < 4
    few = replace(sampler, boundaries=(2,), num_chunks=7)  # only 5 and 6 are left
    law = {}
    for skips, p in chain_law(3, 2).items():
        law[expand([0, 5, 6, window], skips), tuple(range(window))] = p
    assert abs(misfit(laws(few, 50, tokens), law)) < 4
    none = replace(sampler, boundaries=(5,))
    assert set(laws(none, 50, tokens, 50)) == {(tuple(range(window)),) * 2}


@pytest.mark.parametrize(
    "source, content", [(27, "uniform"), (40, "uniform"), (100, "uniform"), (100, "contiguous")]
)
def test_cream_has_its_stated_law(source, content):
    # L = 27, f = 2: head and tail of 9 or of 8; a in {2, 3, 4} from N(3, 3), clipped to [2, 4].
    window, target, normal = 27, 54, NormalDist(3, 3)
    chance = {2: normal.cdf(3), 3: normal.cdf(4) - normal.cdf(3), 4: 1 - normal.cdf(4)}
    law = Counter()
    for head in (8, 9):
        middle = window - 2 * head
        for a, p in chance.items():
            lasts = range(int(head + (middle - 1) * a / 2), int(a / 2 * window) - head)
            for last in lasts:
                first = last - middle + 1
                positions = (*range(head), *range(first, last + 1), *range(target - head, target))
                at = first if last < source - head else source - head - middle
                text = (*range(head), *range(at, at + middle), *range(source - head, source))
                if content == "contiguous":
                    text = tuple(range(window))
                law[positions, text] += Fraction(p / 2) / len(lasts)
    rest = 1 - sum(law.values())
    assert abs(rest) < 1e-12  # of the floats in `chance`
    law[next(iter(law))] += rest
    seen = laws(PoseSampler(window, target, "cream", content=content), source)
    assert abs(misfit(seen, dict(law))) < 4


def test_cream_leans_to_the_middle_of_the_paper():
    # f = 8: a has the mean 1 + f = 9 to within the rounding down.
    sampler = PoseSampler(2048, 16384, "cream")
    plans = sampler.plans(range(4000), 20000)
    last = plans.position_starts[:, 1] + plans.lengths[:, 1]
    head = plans.lengths[:, 0]
    assert set(head.tolist()) == {32, 682} and abs((head == 32).mean() - 0.5) < 0.03
    assert (plans.position_starts[:, 2] + plans.lengths[:, 2] == 16384).all()
    assert 0.4 < last.mean() / 16384 < 0.6


def test_longrecipe_spreads_the_skips_over_slots():
    tokens = np.array([5, 7, 5, 7, 5, 5])  # sentences of two tokens
    window, target = 6, 8
    law = Counter()
    for slots in itertools.combinations(range(target - window + 3), 3):
        ids = []
        for sentence, slot in enumerate((0, *slots[1:])):
            ids += [2 * sentence + slot - sentence, 2 * sentence + 1 + slot - sentence]
        for kept in range(1, 4):
            positions = (*range(kept), *ids[kept:])
            law[positions, tuple(range(window))] += Fraction(1, math.comb(5, 3) * 3)
    sampler = PoseSampler(window, target, "longrecipe", boundaries=(7,))
    assert abs(misfit(laws(sampler, 30, tokens), dict(law))) < 4
