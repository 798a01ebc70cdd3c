"""positions.py: what every plan keeps, whatever its law, and golden plans that never change."""

import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pose_megatron.positions.laws import CONTENTS, SAMPLERS, SKIP_LAWS, Sampler, SkipPlan
from pose_megatron.positions.sampler import PoseSampler
from tests.unit_tests.positions.test_draws import WORD, stream

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
        **{
            "skip_law": draw(st.sampled_from(SKIP_LAWS)),
            "boundaries": tuple(draw(st.sets(st.integers(0, 12), min_size=1))),
            "plain_fraction": draw(st.sampled_from((0.0, 0.5, 1.0))),
        }
        | options,
    )
    if draw(st.booleans()) and sampler.target > window and "target_schedule" not in options:
        stages = draw(st.sets(st.integers(window, sampler.target - 1), max_size=3))
        firsts = draw(st.sets(st.integers(1, 2**40), min_size=len(stages), max_size=len(stages)))
        sampler = replace(
            sampler,
            target_schedule=tuple(
                zip([0, *sorted(firsts)], [*sorted(stages), sampler.target], strict=True)
            ),
        )
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

    plans = [
        plan(),
        *(plan(**{name: i}) for name in ("seed", "epoch", "index") for i in range(2, 40)),
    ]
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
            assert (
                sampler.plan(i, 500).positions().tolist() == fixed.plan(i, 500).positions().tolist()
            )


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


# The plans, word by word.


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


@pytest.mark.parametrize(
    "options, lengths, positions, text",
    [
        ({}, [1750, 298], [0, 80145], [0, 65829]),
        (
            {"num_chunks": 4, "content": "aligned"},
            [1748, 182, 77, 41],
            [0, 94653, 99126, 99843],
            [0, 94653, 99126, 99843],
        ),
        (
            {"num_chunks": 3, "content": "contiguous"},
            [1749, 182, 117],
            [0, 86155, 128656],
            [0, 1749, 1931],
        ),
        (
            {"num_chunks": 4, "skip_law": "sorted-uniform"},
            [1748, 182, 77, 41],
            [0, 110921, 111619, 124383],
            [0, 49570, 63474, 70302],
        ),
        ({"name": "pose-reference"}, [876, 1172], [0, 79271], [0, 6235]),
        ({"name": "cream"}, [682, 684, 682], [0, 50325, 130390], [0, 50325, 99318]),
        (
            {"target_schedule": ((0, 4096), (5, 32768), (9, 131072))},
            [1750, 298],
            [0, 20416],
            [0, 65829],
        ),
    ],
)
def test_golden_plans_never_change(options, lengths, positions, text):
    # Written down once: a change here changes every run that someone may want to resume.
    plan = PoseSampler(2048, 131072, seed=1234, **options).plan(5, 100_000)
    assert (plan.lengths.tolist(), plan.position_starts.tolist(), plan.text_starts.tolist()) == (
        lengths,
        positions,
        text,
    )


@pytest.mark.parametrize(
    "name, lengths, positions",
    [("pose-boundary", [8, 8, 8], [0, 3489, 3856]), ("longrecipe", [11, 5, 8], [0, 2675, 3879])],
)
def test_golden_plans_over_given_tokens_never_change(name, lengths, positions):
    sampler = PoseSampler(24, 4096, name, num_chunks=3, boundaries=(7,))
    plan = sampler.plan(5, 100_000, tokens=np.arange(24) % 8)
    assert (plan.lengths.tolist(), plan.position_starts.tolist()) == (lengths, positions)


def test_golden_plans_of_every_sampler_never_change():
    # The digest that numpy 1.26.4 and 2.4.6 agree on.
    digest = hashlib.sha256()
    for name, law, content in itertools.product(sorted(SAMPLERS), SKIP_LAWS, CONTENTS):
        sampler = PoseSampler(
            64, 4096, name, 4, content, 7, law, (1, 5), 0.2, ((0, 256), (50, 4096))
        )
        for i in range(80):
            plan = sampler.plan(i, 100 + 9 * i, 2, texts(sampler, i))
            digest.update(np.stack([plan.positions(), plan.text()]).astype("<i8").tobytes())
    assert digest.hexdigest() == (
        "354282dfe190d24213776537aae6a5509cc2ff4f018d54d31d0f092d2e0c3816"
    )


def test_golden_coins_never_change():
    plans = PoseSampler(2048, 131072, plain_fraction=0.5).plans(range(24), 100_000)
    plain = np.flatnonzero(plans.position_starts[:, 1] == plans.lengths[:, 0]).tolist()
    assert plain == [0, 2, 6, 8, 9, 11, 13, 15, 18, 22]


@pytest.mark.parametrize(
    "target, positions",
    [
        (100, [2, 48, 52, 57, 70, 79, 86, 90]),
        (12, [1, 2, 3, 4, 5, 7, 10, 11]),
    ],
)
def test_golden_randpos_never_changes(target, positions):
    plan = PoseSampler(8, target, "randpos", seed=1234).plan(5, 8, epoch=2)
    assert plan.positions().tolist() == positions


def test_numpys_integers_address_the_same_plan():
    sampler = PoseSampler(8, 64, num_chunks=3, target_schedule=((0, 20), (5, 64)))
    for i in range(12):
        assert (
            sampler.plan(np.int64(i), np.int32(99)).positions().tolist()
            == sampler.plan(i, 99).positions().tolist()
        )


def test_tokens_are_missed():
    sampler = PoseSampler(8, 64, "longrecipe", boundaries=(3,))
    with pytest.raises(ValueError, match="--position-sampler longrecipe cuts at tokens: give it"):
        sampler.plan(0, 8)


def test_a_new_sampler_is_a_function_and_a_line(monkeypatch):
    def shifted(draw, sampler, target, source, chunk_starts):
        start = draw.integer(0, target - sampler.window)
        return SkipPlan(*np.array([[sampler.window], [start], [0]]))

    monkeypatch.setitem(SAMPLERS, "shifted", Sampler(shifted))
    sampler = PoseSampler(8, 64, "shifted")
    starts = {int(sampler.plan(i, 8).positions()[0]) for i in range(600)}
    assert starts == set(range(57))
    assert (
        sampler.plans(range(4), 8).positions()[3].tolist()
        == sampler.plan(3, 8).positions().tolist()
    )


@pytest.mark.parametrize(
    "options, words",
    [
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
    ],
)
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
