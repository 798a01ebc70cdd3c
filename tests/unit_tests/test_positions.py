"""positions.py against the paper's laws, exact probabilities and an independent Philox."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pose_megatron.positions import CONTENTS, SAMPLERS, Draw, PoseSampler

WORD = 2**64


@st.composite
def samples(draw, names=tuple(SAMPLERS), contents=CONTENTS):
    """(sampler, source length, index, epoch), every size up to a few hundred and beyond."""
    window = draw(st.integers(1, 60))
    reach = st.one_of(st.just(0), st.integers(0, 200), st.integers(0, 2**20))
    sampler = PoseSampler(
        window,
        window + draw(reach),
        name=draw(st.sampled_from(names)),
        num_chunks=draw(st.one_of(st.just(1), st.just(window), st.integers(1, window))),
        content=draw(st.sampled_from(contents)),
        seed=draw(st.integers(0, WORD - 1)),
    )
    return sampler, window + draw(reach), draw(st.integers(0, 2**40)), draw(st.integers(0, 50))


@settings(max_examples=300, deadline=None)
@given(samples())
def test_every_sampler_keeps_what_training_relies_on(sample):
    sampler, source, index, epoch = sample
    plan = sampler.plan(index, source, epoch)
    lengths, positions, text = plan.lengths, plan.positions(), plan.text()
    assert lengths.min() >= 1 and lengths.sum() == sampler.window
    assert len(positions) == len(text) == sampler.window
    assert positions.dtype == text.dtype == np.int64
    assert 0 <= positions[0] and positions[-1] < sampler.target
    assert 0 <= text[0] and text[-1] < source
    assert (np.diff(positions) >= 1).all() and (np.diff(text) >= 1).all()
    # Inside a chunk both are continuous, so chunks never overlap.
    inside = np.ones(sampler.window, bool)
    inside[np.cumsum(lengths) - lengths] = False
    steps = inside[1:]
    assert (np.diff(positions)[steps] == 1).all() and (np.diff(text)[steps] == 1).all()


@settings(max_examples=200, deadline=None)
@given(samples(names=("pose",)))
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
    plan = sampler.plan(index, source, epoch)
    stretches = []
    for token in plan.text().tolist():
        if stretches and token == stretches[-1][-1] + 1:
            stretches[-1].append(token)
        else:
            stretches.append([token])
    assert plan.runs() == [(s[0], len(s)) for s in stretches]


@given(samples())
def test_a_plan_depends_on_its_address_alone(sample):
    sampler, source, index, epoch = sample
    first = sampler.plan(index, source, epoch)
    np.random.seed(0)  # no global state takes part
    sampler.plan(index + 1, source, epoch)
    again = sampler.plan(index, source, epoch)
    assert first.positions().tolist() == again.positions().tolist()
    assert first.text().tolist() == again.text().tolist()


def test_seed_epoch_and_index_each_change_the_plan():
    def plan(seed=1, epoch=0, index=0):
        sampler = PoseSampler(2048, 131072, num_chunks=4, seed=seed)
        return tuple(sampler.plan(index, 10**6, epoch).text_starts)

    plans = [plan(), *(plan(**{name: i}) for name in ("seed", "epoch", "index")
                       for i in range(2, 40))]
    assert len(set(plans)) == len(plans)


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


@given(st.integers(1, 80), st.integers(0, 2**20), st.integers(0, 2**40))
def test_randpos_keeps_the_text_contiguous(window, reach, index):
    plan = PoseSampler(window, window + reach, "randpos").plan(index, window)
    assert plan.text().tolist() == list(range(window)) and plan.runs() == [(0, window)]
    if not reach:
        assert plan.positions().tolist() == list(range(window))


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


def stream(seed: int, epoch: int, index: int):
    """The words of a sample. numpy counts a block before it makes it: the first is number 1."""
    for block in itertools.count(1):
        yield from philox((seed, 0), (block, 0, index, epoch))


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


@given(addresses, st.integers(-(10**6), 10**6), st.integers(0, 2**62))
def test_integer_is_the_top_of_a_philox_word(address, low, span):
    draw, words = Draw(*address), stream(*address)
    for _ in range(6):
        assert draw.integer(low, low + span) == low + (next(words) * (span + 1) >> 64)


@given(addresses, st.integers(1, 2**32 - 1), st.integers(1, 30))
def test_integers_is_exact_128_bit_arithmetic(address, below, count):
    expected = [word * below >> 64 for word in itertools.islice(stream(*address), count)]
    drawn = Draw(*address).integers(below, count)
    assert drawn.tolist() == expected and drawn.dtype == np.int64


@settings(max_examples=100, deadline=None)
@given(samples(names=("pose",), contents=("uniform",)))
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
@given(samples(names=("randpos",)))
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


@pytest.mark.parametrize("options, lengths, positions, text", [
    ({}, [1750, 298], [0, 80145], [0, 65829]),
    ({"num_chunks": 4, "content": "aligned"},
     [1748, 182, 77, 41], [0, 94653, 99126, 99843], [0, 94653, 99126, 99843]),
    ({"num_chunks": 3, "content": "contiguous"},
     [1749, 182, 117], [0, 86155, 128656], [0, 1749, 1931]),
])
def test_golden_plans_never_change(options, lengths, positions, text):
    # Written down once: a change here changes every run that someone may want to resume.
    plan = PoseSampler(2048, 131072, seed=1234, **options).plan(5, 100_000)
    assert (plan.lengths.tolist(), plan.position_starts.tolist(), plan.text_starts.tolist()) == (
        lengths, positions, text)


@pytest.mark.parametrize("target, positions", [
    (100, [2, 48, 52, 57, 70, 79, 86, 90]),
    (12, [1, 2, 3, 4, 5, 7, 10, 11]),
])
def test_golden_randpos_never_changes(target, positions):
    plan = PoseSampler(8, target, "randpos", seed=1234).plan(5, 8, epoch=2)
    assert plan.positions().tolist() == positions


@pytest.mark.parametrize("options, words", [
    ({"window": 9, "target": 8}, ["--seq-length 9", "--max-position-embeddings 8"]),
    ({"num_chunks": 9}, ["--pose-num-chunks 9", "--seq-length 8"]),
    ({"num_chunks": 0}, ["--pose-num-chunks 0"]),
    ({"name": "skip"}, ["--position-sampler skip", "pose, randpos, full"]),
    ({"content": "random"}, ["--pose-content random", "uniform, contiguous, aligned"]),
    ({"window": 0}, ["--seq-length", "0"]),
    ({"seed": -1}, ["--seed -1"]),
    ({"seed": WORD}, [f"--seed {WORD}"]),
])
def test_a_sampler_that_cannot_be_names_flag_and_value(options, words):
    with pytest.raises(ValueError) as error:
        PoseSampler(**{"window": 8, "target": 64} | options)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_source_shorter_than_the_window_is_an_error(name):
    sampler = PoseSampler(8, 64, name)
    sampler.plan(3, source=8)
    with pytest.raises(ValueError, match="sample 3: its source has 7 tokens.*--seq-length 8"):
        sampler.plan(3, source=7)
