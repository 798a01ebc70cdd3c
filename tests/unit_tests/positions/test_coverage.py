"""coverage.py against the definition itself: every sample of tiny windows, counted in fractions."""

import itertools
import json
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from pose_megatron.positions.coverage import contained, coverage
from pose_megatron.positions.sampler import PoseSampler
from tests.processes import PATIENCE


def distances(positions) -> set[int]:
    return {b - a for a, b in itertools.combinations_with_replacement(positions, 2)}


def count(samples, target: int) -> list[Fraction]:
    """Coverage from (positions, probability) of every sample there is."""
    curve = [Fraction(0)] * target
    total = Fraction(0)
    for positions, p in samples:
        total += p
        for d in distances(positions):
            curve[d] += p
    assert total == 1
    return curve


def cuts(window: int, chunks: int):
    """(lengths, probability) by Figure 6: each first chunk uniform, a token left for the others."""
    if chunks == 1:
        yield (window,), Fraction(1)
        return
    most = window - chunks + 1
    for length in range(1, most + 1):
        for rest, p in cuts(window - length, chunks - 1):
            yield (length, *rest), p / most


def skips(chunks: int, room: int, low: int = 0):
    """(u, probability) by equation 4."""
    if chunks == 1:
        yield (low,), Fraction(1)
        return
    for later in range(low, room + 1):
        for rest, p in skips(chunks - 1, room, later):
            yield (low, *rest), p / (room - low + 1)


def lay(lengths, u) -> list[int]:
    positions, start = [], 0
    for length, skip in zip(lengths, u, strict=True):
        positions += range(start + skip, start + skip + length)
        start += length
    return positions


def pose(window, target, chunks):
    for (lengths, p), (u, q) in itertools.product(
        cuts(window, chunks), skips(chunks, target - window)
    ):
        yield lay(lengths, u), p * q


def randpos(window, target):
    subsets = list(itertools.combinations(range(target), window))
    return ((subset, Fraction(1, len(subsets))) for subset in subsets)


def test_the_counting_of_this_file_on_a_case_by_hand():
    # L = 2, T = 4, two chunks of one token: u is 0, 1 or 2, so the distance is 1, 2 or 3.
    assert count(pose(2, 4, 2), 4) == [1, *[Fraction(1, 3)] * 3]


@pytest.mark.parametrize("window", range(2, 9))
@pytest.mark.parametrize("reach", [0, 1, 2, 5, 12])
def test_two_chunks_are_exact(window, reach):
    target = window + reach
    curve = coverage(PoseSampler(window, target), 100, samples=0)
    assert curve.samples == 0 and not curve.standard_error.any()
    assert curve.probability == pytest.approx(
        [float(p) for p in count(pose(window, target, 2), target)], abs=1e-12
    )


@pytest.mark.parametrize("window, target", [(2, 5), (5, 9), (6, 20), (7, 7)])
def test_the_authors_rule_is_exact(window, target):
    half, room = (window + 1) // 2, target - window
    every = (
        (lay((cut, window - cut), (0, u)), Fraction(1, half * (room + 1)))
        for cut in range(1, half + 1)
        for u in range(room + 1)
    )
    curve = coverage(PoseSampler(window, target, "pose-reference"), 100, samples=0)
    assert curve.probability == pytest.approx([float(p) for p in count(every, target)], abs=1e-12)


def test_aligned_text_bounds_the_distances_by_the_source():
    curve = coverage(PoseSampler(5, 30, content="aligned"), 9, samples=0)
    assert curve.probability[:9] == pytest.approx([float(p) for p in count(pose(5, 9, 2), 9)])
    assert not curve.probability[9:].any()


def test_plain_windows_and_plain_shares():
    plain = [1.0] * 6 + [0.0] * 14
    assert coverage(PoseSampler(6, 20, "full"), 20, 0).probability.tolist() == plain
    assert coverage(PoseSampler(6, 20, num_chunks=1), 20, 0).probability.tolist() == plain
    mixed = coverage(PoseSampler(6, 20, plain_fraction=0.25), 20, 0).probability
    skipped = [float(p) for p in count(pose(6, 20, 2), 20)]
    assert mixed == pytest.approx(0.25 * np.array(plain) + 0.75 * np.array(skipped))


@pytest.mark.parametrize(
    "sampler, every",
    [
        (PoseSampler(6, 12, num_chunks=3), pose(6, 12, 3)),
        (PoseSampler(5, 9, num_chunks=5), pose(5, 9, 5)),
        (PoseSampler(4, 9, "randpos"), randpos(4, 9)),
    ],
    ids=["3 chunks", "5 chunks", "randpos"],
)
def test_drawn_curves_lie_within_their_own_error(sampler, every):
    curve = coverage(sampler, 100, samples=20000)
    truth = np.array([float(p) for p in count(every, sampler.target)])
    assert curve.samples == 20000
    assert curve.standard_error == pytest.approx(
        np.sqrt(truth * (1 - truth) / 20000), rel=0.1, abs=1e-12
    )
    assert (np.abs(curve.probability - truth) <= 4.5 * curve.standard_error + 1e-12).all()


@pytest.mark.parametrize(
    "name, options",
    [
        ("pose", {"num_chunks": 3}),
        ("pose", {"num_chunks": 30}),
        ("randpos", {}),
        ("cream", {}),
        ("longrecipe", {}),
        ("pose-boundary", {"num_chunks": 6}),
    ],
)
def test_a_sample_contains_the_differences_of_its_positions(name, options):
    window, target = 40, 333
    sampler = PoseSampler(window, target, name, boundaries=(0, 1), **options)
    tokens = [np.arange(i, i + window) ** 2 % 9 for i in range(30)]
    plans = sampler.plans(range(30), 400, tokens=tokens)
    for row, positions in zip(contained(plans, target), plans.positions().tolist(), strict=True):
        assert set(np.flatnonzero(row).tolist()) == distances(positions)


def test_the_papers_figure_as_a_user_draws_it(root, tmp_path):
    run = subprocess.run(
        [
            sys.executable,
            str(root / "tools/plot_coverage.py"),
            "--samples",
            "300",
            "--output",
            str(tmp_path / "figure.png"),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "figure.json").read_text())
    curves = {curve["sampler"]: np.array(curve["probability"]) for curve in result["curves"]}
    assert list(curves) == ["full (plain)", "pose, 2 chunks", "pose, 3 chunks", "randpos"]
    full, two, three, randpos = curves.values()
    assert full.sum() == 2048 and len(full) == 16384
    # Beyond the window one sample in T / L - 1 has a given distance; 3 chunks have it oftener.
    assert two[2048:14337] == pytest.approx(2047 / 14337, abs=1e-6)
    assert two[:1024].min() == 1 and two[16383] == pytest.approx(1 / 14337, abs=1e-6)
    assert 0.28 < three[1:].mean() < 0.33 and 0.2 < two[1:].mean() < 0.22
    assert randpos[1:].mean() > 0.99


@pytest.mark.parametrize(
    "words, message",
    [
        (["skip"], "--position-sampler skip is none of pose"),
        (["pose,chunks=3"], "pose,chunks=3: option 'chunks' is none of num-chunks"),
        (["pose,num-chunks=few"], "num-chunks 'few' is not a whole number"),
        (["--window", "64", "--target", "32"], "--seq-length 64 (the window L) is greater than"),
        (["--source", "5"], "--source 5 is shorter than --window 2048"),
        (["pose,plain-fraction=2"], "plain-fraction must be in [0, 1], not 2.0"),
    ],
)
def test_wrong_words_are_one_sentence(monkeypatch, capsys, words, message):
    from pose_megatron.commands import plot_coverage

    monkeypatch.setattr(sys, "argv", ["plot_coverage.py", *words])
    # With a process group, which another test may have left, the program ends this process.
    monkeypatch.setattr("pose_megatron.runtime.cli._process_group", lambda: None)
    assert plot_coverage.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("plot_coverage.py: error: ") and message in error
