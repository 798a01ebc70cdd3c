"""positions.py, samplers.py and draws.py against the laws, exact probabilities, another Philox."""

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

from pose_megatron.draws import Draw, Draws
from pose_megatron.positions import PoseSampler
from pose_megatron.samplers import CONTENTS, SAMPLERS, SKIP_LAWS, Sampler, SkipPlan

WORD = 2**64
PLAIN = ("pose", "randpos", "full")  # what the first release had: their plans never change


def texts(sampler, index):
    """Tokens 0 to 9 of a window, which depend on the index."""
    return np.array([(i * i + index) % 10 for i in range(sampler.window)])


def plan_of(sampler, source, index, epoch=0):
    return sampler.plan(index, source, epoch, texts(sampler, index))


@st.composite
def samples(draw, names=tuple(SAMPLERS), contents=CONTENTS, **options):
    """(sampler, source length, index, epoch), every size up to a few hundred and beyond."""
    name = draw(st.sampled_from(names))
    window = draw(st.integers(SAMPLERS[name].min_window, 60))
    reach = st.one_of(st.just(0), st.integers(0, 200), st.integers(0, 2**20))
    sampler = PoseSampler(
        window,
        window + draw(reach),
        name=name,
        num_chunks=draw(st.one_of(st.just(1), st.just(window), st.integers(1, window))),
        content=draw(st.sampled_from(contents)),
        seed=draw(st.integers(0, WORD - 1)),
        **{"skip_law": draw(st.sampled_from(SKIP_LAWS)),
           "boundaries": tuple(draw(st.sets(st.integers(0, 12), min_size=1))),
           "plain_fraction": draw(st.sampled_from((0.0, 0.5, 1.0)))} | options,
    )
    if draw(st.booleans()) and sampler.target > window and "target_schedule" not in options:
        stages = draw(st.sets(st.integers(window, sampler.target - 1), max_size=3))
        firsts = draw(st.sets(st.integers(1, 2**40), min_size=len(stages), max_size=len(stages)))
        sampler = replace(sampler, target_schedule=tuple(zip(
            [0, *sorted(firsts)], [*sorted(stages), sampler.target], strict=True)))
    return sampler, window + draw(reach), draw(st.integers(0, 2**40)), draw(st.integers(0, 50))


paper = {"skip_law": "chain", "plain_fraction": 0.0, "target_schedule": ()}


@settings(max_examples=300, deadline=None)
@given(samples())
def test_every_sampler_keeps_what_training_relies_on(sample):
    sampler, source, index, epoch = sample
    plan = plan_of(sampler, source, index, epoch)
    lengths, positions, text = plan.lengths, plan.positions(), plan.text()
    assert lengths.min() >= 1 and lengths.sum() == sampler.window
    assert len(positions) == len(text) == sampler.window
    assert positions.dtype == text.dtype == np.int64
    assert 0 <= positions[0] and positions[-1] < sampler.target_at(index) <= sampler.target
    assert 0 <= text[0] and text[-1] < source
    assert (np.diff(positions) >= 1).all() and (np.diff(text) >= 1).all()
    # Inside a chunk both are continuous, so chunks never overlap.
    inside = np.ones(sampler.window, bool)
    inside[np.cumsum(lengths) - lengths] = False
    steps = inside[1:]
    assert (np.diff(positions)[steps] == 1).all() and (np.diff(text)[steps] == 1).all()


@settings(max_examples=200, deadline=None)
@given(samples(names=("pose",), plain_fraction=0.0))
def test_pose_starts_at_zero_and_its_text_obeys_the_content_rule(sample):
    sampler, source, index, epoch = sample
    plan = sampler.plan(index, source, epoch)
    positions, text = plan.positions(), plan.text()
    assert len(plan.lengths) == sampler.num_chunks
    assert positions[0] == text[0] == 0
    if sampler.content == "contiguous":
        assert text.tolist() == list(range(sampler.window))
    if sampler.content == "aligned":
        assert text.tolist() == positions.tolist()


@settings(max_examples=200, deadline=None)
@given(samples())
def test_runs_are_the_contiguous_stretches_of_text(sample):
    sampler, source, index, epoch = sample
    plan = plan_of(sampler, source, index, epoch)
    stretches = []
    for token in plan.text().tolist():
        if stretches and token == stretches[-1][-1] + 1:
            stretches[-1].append(token)
        else:
            stretches.append([token])
    assert plan.runs() == [(s[0], len(s)) for s in stretches]


@settings(deadline=None)
@given(samples())
def test_a_plan_depends_on_its_address_alone(sample):
    sampler, source, index, epoch = sample
    first = plan_of(sampler, source, index, epoch)
    np.random.seed(0)  # no global state takes part
    plan_of(sampler, source, index + 1, epoch)
    again = plan_of(sampler, source, index, epoch)
    assert first.positions().tolist() == again.positions().tolist()
    assert first.text().tolist() == again.text().tolist()


def test_seed_epoch_and_index_each_change_the_plan():
    def plan(seed=1, epoch=0, index=0):
        sampler = PoseSampler(2048, 131072, num_chunks=4, seed=seed)
        return tuple(sampler.plan(index, 10**6, epoch).text_starts)

    plans = [plan(), *(plan(**{name: i}) for name in ("seed", "epoch", "index")
                       for i in range(2, 40))]
    assert len(set(plans)) == len(plans)


@settings(deadline=None)
@given(samples(names=("pose",)))
def test_one_chunk_or_no_room_means_plain_positions(sample):
    sampler, source, index, _ = sample
    plain = list(range(sampler.window))
    one = PoseSampler(sampler.window, sampler.target, num_chunks=1, content=sampler.content)
    assert one.plan(index, source).positions().tolist() == plain
    assert one.plan(index, source).text().tolist() == plain
    tight = PoseSampler(sampler.window, sampler.window, num_chunks=sampler.num_chunks)
    assert tight.plan(index, source).positions().tolist() == plain
    assert tight.plan(index, sampler.window).text().tolist() == plain


@settings(deadline=None)
@given(samples(names=("full",)))
def test_full_is_the_plain_window(sample):
    sampler, source, index, epoch = sample
    plan = sampler.plan(index, source, epoch)
    assert plan.positions().tolist() == plan.text().tolist() == list(range(sampler.window))


# The laws, by exact probabilities.


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
        law = {(*x, y): p / (room - x[-1] + 1)
               for x, p in law.items() for y in range(x[-1], room + 1)}
    return law


def stick_law(count: int, window: int) -> dict[tuple, Fraction]:
    """Each length uniform in {1, ..., what leaves one token for every later chunk}."""
    law = {(): Fraction(1)}
    for later in range(count - 1, 0, -1):
        law = {(*x, y): p / (window - sum(x) - later)
               for x, p in law.items() for y in range(1, window - sum(x) - later + 1)}
    return {(*x, window - sum(x)): p for x, p in law.items()}


def observe(sampler, source, addresses):
    """Counts (lengths, u, v): the skips of equations 4 and 5, without what precedes a chunk."""
    seen = Counter()
    for seed, epoch, index in addresses:
        plan = PoseSampler(
            sampler.window, sampler.target, sampler.name, sampler.num_chunks, sampler.content, seed
        ).plan(index, source, epoch)
        starts = np.cumsum(plan.lengths) - plan.lengths
        seen[tuple(plan.lengths.tolist()), tuple((plan.position_starts - starts).tolist()),
             tuple((plan.text_starts - starts).tolist())] += 1
    return seen


@pytest.mark.parametrize("walk", ["index", "epoch", "seed"])
def test_uniform_content_has_the_papers_joint_law(walk):
    window, target, source, chunks = 5, 7, 6, 3
    sticks, u, v = stick_law(chunks, window), chain_law(chunks, 2), chain_law(chunks, 1)
    law = {(a, b, c): p * q * r for (a, p), (b, q), (c, r) in
           itertools.product(sticks.items(), u.items(), v.items())}
    addresses = [{"index": (7, 3, i), "epoch": (7, i, 3), "seed": (i, 7, 3)}[walk]
                 for i in range(12000)]
    seen = observe(PoseSampler(window, target, num_chunks=chunks), source, addresses)
    assert abs(misfit(seen, law)) < 4


@pytest.mark.parametrize("source, room", [(30, 4), (7, 2)])
def test_aligned_content_is_bounded_by_the_shorter_of_target_and_source(source, room):
    sampler = PoseSampler(5, 9, num_chunks=3, content="aligned")
    law = {(a, b, b): p * q for (a, p), (b, q) in
           itertools.product(stick_law(3, 5).items(), chain_law(3, room).items())}
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
    law = merge(*(
        ((tuple(expand([0, a, a + b, window], [0, *sorted(u)])), tuple(range(window))),
         p / 16)
        for (a, b, _), p in stick_law(chunks, window).items()
        for u in itertools.product(range(4), repeat=2)))
    sampler = PoseSampler(window, target, num_chunks=chunks, content="contiguous",
                          skip_law="sorted-uniform")
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
    law = merge(*(
        ((expand([0, *cuts, window], skips), tuple(range(window))), p / 3)
        for cuts in itertools.combinations((1, 2, 3), 2)
        for skips, p in chain_law(3, 2).items()))
    sampler = PoseSampler(window, target, "pose-boundary", num_chunks=3, boundaries=(7, 9, 1000))
    assert abs(misfit(laws(sampler, 50, tokens), law)) < 4
    few = replace(sampler, boundaries=(2,), num_chunks=7)  # only 5 and 6 are left
    law = {}
    for skips, p in chain_law(3, 2).items():
        law[expand([0, 5, 6, window], skips), tuple(range(window))] = p
    assert abs(misfit(laws(few, 50, tokens), law)) < 4
    none = replace(sampler, boundaries=(5,))
    assert set(laws(none, 50, tokens, 50)) == {(tuple(range(window)),) * 2}


@pytest.mark.parametrize("source, content", [(27, "uniform"), (40, "uniform"), (100, "uniform"),
                                             (100, "contiguous")])
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


@settings(deadline=None)
@given(samples(plain_fraction=0.0), st.sampled_from((0.0, 0.1, 0.5, 1.0)))
def test_a_plain_share_leaves_the_other_samples_alone(sample, share):
    sampler, source, index, epoch = sample
    mixed = plan_of(replace(sampler, plain_fraction=share), source, index, epoch)
    skipped = plan_of(sampler, source, index, epoch)
    plain = list(range(sampler.window))
    if mixed.positions().tolist() != skipped.positions().tolist() or share == 1:
        assert share and mixed.positions().tolist() == mixed.text().tolist() == plain
    else:
        assert mixed.text().tolist() in (skipped.text().tolist(), plain)


def test_the_plain_share_is_the_share_and_independent_of_the_plan():
    sampler = PoseSampler(64, 4096, plain_fraction=0.3)
    flat = sampler.plans(range(8000), 5000).position_starts[:, 1] < 64
    assert abs(flat.mean() - 0.3) < 0.02
    first = replace(sampler, plain_fraction=0.0).plans(range(8000), 5000).lengths[:, 0]
    assert abs(first[flat].mean() - first[~flat].mean()) < 2


def test_the_target_grows_as_scheduled():
    stages = ((0, 100), (50, 1000), (60, 4096))
    sampler = PoseSampler(64, 4096, num_chunks=3, target_schedule=stages)
    for first, last, target in ((0, 49, 100), (50, 59, 1000), (60, 500, 4096)):
        fixed = PoseSampler(64, target, num_chunks=3)
        for i in {first, last, (first + last) // 2}:
            assert sampler.target_at(i) == target
            assert sampler.plan(i, 500).positions().tolist() == fixed.plan(i, 500).positions(
            ).tolist()


@settings(max_examples=150, deadline=None)
@given(samples(), st.lists(st.integers(0, 2**40), max_size=6), st.integers(0, 300))
def test_a_batch_holds_the_plans_of_one_at_a_time(sample, others, spread):
    sampler, source, index, epoch = sample
    indices = [index, *others]
    sources = [source + i * spread for i in range(len(indices))]
    tokens = [texts(sampler, i) for i in indices]
    batch = sampler.plans(indices, sources, epoch, tokens)
    for row, one in enumerate(zip(indices, sources, tokens, strict=True)):
        plan = sampler.plan(one[0], one[1], epoch, one[2])
        n = len(plan.lengths)
        for mine, theirs in zip(batch, plan, strict=True):
            assert mine.dtype == np.int64 and mine[row, :n].tolist() == theirs.tolist()
        assert not batch.lengths[row, n:].any()
        assert batch.positions()[row].tolist() == plan.positions().tolist()
        assert batch.text()[row].tolist() == plan.text().tolist()


# The random stream, whatever numpy does.


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


@pytest.mark.parametrize("key, counter, block", [
    # Known answers that the authors of Philox publish with Random123.
    ((0, 0), (0, 0, 0, 0),
     "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    ((WORD - 1,) * 2, (WORD - 1,) * 4,
     "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    ((0x452821E638D01377, 0xBE5466CF34E90C6C),
     (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
     "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6"),
])
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


@settings(max_examples=100, deadline=None)
@given(samples(names=("pose",), contents=("uniform",), **paper))
def test_a_plan_is_the_papers_equations_over_that_stream(sample):
    sampler, source, index, epoch = sample
    words = stream(sampler.seed, epoch, index)

    def uniform(low, high):
        return low + (next(words) * (high - low + 1) >> 64)

    chunks, left, lengths = sampler.num_chunks, sampler.window, []
    for i in range(chunks - 1):
        lengths.append(uniform(1, left - (chunks - 1 - i)))
        left -= lengths[-1]
    lengths.append(left)
    skips = []
    for room in (sampler.target - sampler.window, source - sampler.window):
        chain = [0]
        while len(chain) < chunks:
            chain.append(uniform(chain[-1], room))
        skips.append(chain)
    before = [sum(lengths[:i]) for i in range(chunks)]
    plan = sampler.plan(index, source, epoch)
    assert plan.lengths.tolist() == lengths
    assert plan.position_starts.tolist() == [u + b for u, b in zip(skips[0], before, strict=True)]
    assert plan.text_starts.tolist() == [v + b for v, b in zip(skips[1], before, strict=True)]


@settings(max_examples=100, deadline=None)
@given(samples(names=("randpos",), **paper))
def test_randpos_is_the_first_distinct_words_of_that_stream(sample):
    sampler, source, index, epoch = sample
    window, target = sampler.window, sampler.target
    fewer = window if window <= target // 2 else target - window  # the smaller side is drawn
    chosen = set()
    words = stream(sampler.seed, epoch, index)
    while len(chosen) < fewer:
        chosen.add(next(words) * target >> 64)
    if fewer != window:
        chosen = set(range(target)) - chosen
    assert sampler.plan(index, source, epoch).positions().tolist() == sorted(chosen)


@settings(deadline=None)
@given(st.integers(0, WORD - 1), st.integers(0, 2**32), st.integers(0, 2),
       st.lists(st.integers(0, 2**48), min_size=1, max_size=5),
       st.lists(st.tuples(st.integers(-(10**6), 10**6), st.integers(0, 2**62)), max_size=9))
def test_a_batch_of_draws_is_that_stream_in_every_row(seed, epoch, kind, indices, ranges):
    draws = Draws(seed, epoch, np.array(indices), kind)
    rows = [stream(seed, epoch, index, kind) for index in indices]
    for low, span in ranges:
        assert draws.integer(low, low + span).tolist() == [
            low + (next(row) * (span + 1) >> 64) for row in rows]


@settings(deadline=None)
@given(addresses, st.lists(st.integers(0, 9), max_size=8))
def test_single_and_bulk_draws_share_one_stream(address, counts):
    draw, words = Draw(*address), stream(*address)
    for count in counts:
        if count:
            assert draw.integers(2**20, count).tolist() == [
                next(words) * 2**20 >> 64 for _ in range(count)]
        else:
            assert draw.integer(0, 2**20 - 1) == next(words) * 2**20 >> 64


@pytest.mark.parametrize("options, lengths, positions, text", [
    ({}, [1750, 298], [0, 80145], [0, 65829]),
    ({"num_chunks": 4, "content": "aligned"},
     [1748, 182, 77, 41], [0, 94653, 99126, 99843], [0, 94653, 99126, 99843]),
    ({"num_chunks": 3, "content": "contiguous"},
     [1749, 182, 117], [0, 86155, 128656], [0, 1749, 1931]),
    ({"num_chunks": 4, "skip_law": "sorted-uniform"},
     [1748, 182, 77, 41], [0, 110921, 111619, 124383], [0, 49570, 63474, 70302]),
    ({"name": "pose-reference"}, [876, 1172], [0, 79271], [0, 6235]),
    ({"name": "cream"}, [682, 684, 682], [0, 50325, 130390], [0, 50325, 99318]),
    ({"target_schedule": ((0, 4096), (5, 32768), (9, 131072))},
     [1750, 298], [0, 20416], [0, 65829]),
])
def test_golden_plans_never_change(options, lengths, positions, text):
    # Written down once: a change here changes every run that someone may want to resume.
    plan = PoseSampler(2048, 131072, seed=1234, **options).plan(5, 100_000)
    assert (plan.lengths.tolist(), plan.position_starts.tolist(), plan.text_starts.tolist()) == (
        lengths, positions, text)


@pytest.mark.parametrize("name, lengths, positions", [
    ("pose-boundary", [8, 8, 8], [0, 3489, 3856]), ("longrecipe", [11, 5, 8], [0, 2675, 3879])])
def test_golden_plans_over_given_tokens_never_change(name, lengths, positions):
    sampler = PoseSampler(24, 4096, name, num_chunks=3, boundaries=(7,))
    plan = sampler.plan(5, 100_000, tokens=np.arange(24) % 8)
    assert (plan.lengths.tolist(), plan.position_starts.tolist()) == (lengths, positions)


def test_golden_coins_never_change():
    plans = PoseSampler(2048, 131072, plain_fraction=0.5).plans(range(24), 100_000)
    plain = np.flatnonzero(plans.position_starts[:, 1] == plans.lengths[:, 0]).tolist()
    assert plain == [0, 2, 6, 8, 9, 11, 13, 15, 18, 22]


@pytest.mark.parametrize("target, positions", [
    (100, [2, 48, 52, 57, 70, 79, 86, 90]),
    (12, [1, 2, 3, 4, 5, 7, 10, 11]),
])
def test_golden_randpos_never_changes(target, positions):
    plan = PoseSampler(8, target, "randpos", seed=1234).plan(5, 8, epoch=2)
    assert plan.positions().tolist() == positions


def test_numpys_integers_address_the_same_plan():
    sampler = PoseSampler(8, 64, num_chunks=3, target_schedule=((0, 20), (5, 64)))
    for i in range(12):
        assert sampler.plan(np.int64(i), np.int32(99)).positions().tolist() == sampler.plan(
            i, 99).positions().tolist()


def test_tokens_are_missed():
    sampler = PoseSampler(8, 64, "longrecipe", boundaries=(3,))
    with pytest.raises(ValueError, match="--position-sampler longrecipe cuts at tokens: give it"):
        sampler.plan(0, 8)


def test_a_new_sampler_is_a_function_and_a_line(monkeypatch):
    def shifted(draw, ask, target, source, cuts):
        start = draw.integer(0, target - ask.window)
        return SkipPlan(*np.array([[ask.window], [start], [0]]))

    monkeypatch.setitem(SAMPLERS, "shifted", Sampler(shifted))
    sampler = PoseSampler(8, 64, "shifted")
    starts = {int(sampler.plan(i, 8).positions()[0]) for i in range(600)}
    assert starts == set(range(57))
    assert sampler.plans(range(4), 8).positions()[3].tolist() == sampler.plan(3, 8).positions(
    ).tolist()


@pytest.mark.parametrize("options, words", [
    ({"window": 9, "target": 8}, ["--seq-length 9", "--max-position-embeddings 8"]),
    ({"num_chunks": 9}, ["--pose-num-chunks 9", "--seq-length 8"]),
    ({"num_chunks": 0}, ["--pose-num-chunks 0"]),
    ({"name": "skip"}, ["--position-sampler skip", "pose, randpos, full"]),
    ({"content": "random"}, ["--pose-content random", "uniform, contiguous, aligned"]),
    ({"skip_law": "even"}, ["--pose-skip-law even", "chain, sorted-uniform"]),
    ({"name": "cream", "window": 2}, ["--seq-length must be at least 3, not 2"]),
    ({"name": "longrecipe"}, ["--position-sampler longrecipe cuts at", "--pose-boundaries"]),
    ({"plain_fraction": 1.5}, ["--pose-plain-fraction 1.5", "[0, 1]"]),
    ({"target_schedule": ((1, 8), (2, 64))}, ["--pose-target-schedule 1:8 2:64", "start at 0"]),
    ({"target_schedule": ((0, 8), (0, 64))}, ["--pose-target-schedule 0:8 0:64", "ascend"]),
    ({"target_schedule": ((0, 7), (5, 64))}, ["0:7 5:64", "--seq-length 8 or more"]),
    ({"target_schedule": ((0, 8), (5, 32))}, ["--max-position-embeddings 64"]),
    ({"target_schedule": ((0, 16), (4, 8), (5, 64))}, ["targets must ascend"]),
    ({"window": 0}, ["--seq-length", "0"]),
    ({"seed": -1}, ["--seed -1"]),
    ({"seed": WORD}, [f"--seed {WORD}"]),
])
def test_a_sampler_that_cannot_be_names_flag_and_value(options, words):
    with pytest.raises(ValueError) as error:
        PoseSampler(**{"window": 8, "target": 64} | options)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name", PLAIN)
def test_a_source_shorter_than_the_window_is_an_error(name):
    sampler = PoseSampler(8, 64, name)
    sampler.plan(3, source=8)
    with pytest.raises(ValueError, match="sample 3: its source has 7 tokens.*--seq-length 8"):
        sampler.plan(3, source=7)
