"""Blends: the order by its greedy law, stable when a run grows, and every way to write one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pose_megatron.config.flags import DataFlags
from pose_megatron.data.blend import Blend, blends
from pose_megatron.data.dataset import build_datasets
from pose_megatron.positions.sampler import PoseSampler


class Numbers:
    """A dataset whose items say where they are from."""

    def __init__(self, name):
        self.name = name

    def __getitem__(self, index):
        return self.name, int(index)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 80), st.integers(1, 80)
)
def test_the_order_is_greedy_and_a_longer_one_continues_it(weights, size, more):
    blend = Blend([Numbers(i) for i in range(len(weights))], weights, size, None)
    longer = Blend(blend.datasets, weights, size + more, None)
    shares = (np.array(weights) / np.sum(weights)).tolist()
    taken = [0] * len(weights)
    for i in range(size):
        lag = [share * max(i, 1) - n for share, n in zip(shares, taken, strict=True)]
        corpus = lag.index(max(lag))
        assert blend[i] == longer[i] == (corpus, taken[corpus])
        taken[corpus] += 1
    assert len(blend) == size


@pytest.fixture
def corpora(make_corpus):
    """Three, of 400, 90 and 1,000 tokens; the ids say which."""
    return [
        make_corpus([list(range(start + i, start + i + n)) for i in range(0, total, n)], name)
        for name, start, total, n in (
            ("a", 0, 400, 40),
            ("b", 1000, 90, 45),
            ("c", 2000, 1000, 200),
        )
    ]


def build(samples, valid=0, target=64, **data):
    return build_datasets(
        DataFlags(seq_length=8, **data), PoseSampler(8, target, num_chunks=3), 10**6, samples, valid
    )


def same(one, other, count):
    for i in range(count):
        for name in ("tokens", "labels", "position_ids"):
            assert one[i][name].tolist() == other[i][name].tolist(), i


@pytest.mark.parametrize("mode", ["document", "packed"])
@pytest.mark.parametrize("weights", [None, ("0.7", "0.2", "0.1"), ("1", "3", "9")])
def test_a_run_that_grows_keeps_its_samples(world, corpora, mode, weights, tmp_path):
    words = (
        corpora if weights is None else [w for p in zip(weights, corpora, strict=True) for w in p]
    )
    build_ = {"data_path": words, "split": "1,0,0", "data_mode": mode}
    short, long = build(300, **build_).train, build(1100, **build_).train
    assert len(short) == 300 and len(long) == 1100  # several epochs, with weights and without
    same(short, long, 300)
    cached = build(300, data_cache_path=str(tmp_path / "cache"), **build_).train
    again = build(300, data_cache_path=str(tmp_path / "cache"), **build_).train
    same(short, cached, 300)
    same(short, again, 300)
    assert isinstance(again.sources.which, np.memmap)


def test_the_plan_is_that_of_the_blends_index(world, corpora):
    # Two corpora of one content: their samples have the same texts, and still other positions.
    data = build(60, data_path=["1", corpora[0], "1", corpora[0]], split="1,0,0").train
    for i in range(0, 60, 2):
        ((_, _, length),) = data.sources[i]["source"].pieces
        plan = PoseSampler(8, 64, num_chunks=3).plan(i, length - 1)
        assert data[i]["position_ids"].tolist() == plan.positions().tolist()
    first, second = data.sources[0]["source"], data.sources[1]["source"]
    assert first.pieces == second.pieces
    assert data[0]["position_ids"].tolist() != data[1]["position_ids"].tolist()


def test_loader_processes_read_the_same_blend(world, corpora, tmp_path):
    data = build(
        64,
        data_path=["3", corpora[0], "1", corpora[2]],
        split="1,0,0",
        data_mode="packed",
        data_cache_path=str(tmp_path),
    ).train
    loader = torch.utils.data.DataLoader(
        data, batch_size=8, num_workers=2, collate_fn=lambda rows: rows
    )
    fresh = build(
        64, data_path=["3", corpora[0], "1", corpora[2]], split="1,0,0", data_mode="packed"
    ).train
    loaded = [row for rows in loader for row in rows]
    same(loaded, fresh, 64)


def test_a_file_says_what_the_flag_says(world, corpora, tmp_path):
    words = ["0.5", corpora[0], "0.5", corpora[2]]
    file = tmp_path / "blend.txt"
    file.write_text(f"0.5 {corpora[0]}\n0.5 {corpora[2]}\n")
    same(build(50, data_path=words).train, build(50, data_args_path=str(file)).train, 50)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"0.5 a # books\n# 1 b\n\t0.5 c\n", ["0.5", "a", "0.5", "c"]),
        (b"\xef\xbb\xbf0.5 a\r\n0.5 c\r\n", ["0.5", "a", "0.5", "c"]),
        (b"# x\r1 a\r", ["1", "a"]),
        (b"1 \"my books/a\" 2 'c c'", ["1", "my books/a", "2", "c c"]),
        (b'1 a#b 2 bob\'s/c 3 "d#" 4 x"y', ["1", "a#b", "2", "bob's/c", "3", "d#", "4", 'x"y']),
        (b"'a a' \"b'c\" \"d", ["a a", "b'c", '"d']),
    ],
)
def test_a_file_may_have_comments_quotes_and_a_byte_order_mark(tmp_path, content, words):
    file = tmp_path / "blend.txt"
    file.write_bytes(content)
    assert blends(DataFlags(data_args_path=str(file))) == blends(DataFlags(data_path=words))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"# nothing\n", "blend.txt: names no corpus"),
        ("0.5 a".encode("utf-16"), "blend.txt: not UTF-8 text .*save it as UTF-8"),
        (b"0.5 a b 0.5", "blend.txt: b: stands where a weight is due"),
        (b"0.5 a 0 b", "blend.txt: weight 0.0 must be positive"),
        (b"0.5 nowhere/a", "blend.txt: nowhere/a: nowhere/a.idx is missing"),
    ],
)
def test_what_is_wrong_in_a_file_names_the_file(world, tmp_path, content, message):
    (tmp_path / "blend.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"^--data-args-path .*{message}") as caught:
        build(1, data_args_path=str(tmp_path / "blend.txt"))
    assert "--data-path" not in str(caught.value)


def test_a_corpus_is_named_with_the_flag_that_named_it(world, corpora, tmp_path):
    with pytest.raises(ValueError, match=r"^--valid-data-path nowhere: nowhere\.idx is missing"):
        build(1, valid=1, train_data_path=corpora[:1], valid_data_path=["nowhere"])
    (tmp_path / "blend.txt").write_text(corpora[1])
    with pytest.raises(ValueError, match=rf"^--data-args-path .*blend\.txt: {corpora[1]}: none of"):
        build_datasets(
            DataFlags(seq_length=400, data_args_path=str(tmp_path / "blend.txt")),
            PoseSampler(400, 800),
            10**6,
            1,
            0,
        )


def test_each_split_may_have_corpora_of_its_own(world, corpora):
    data = build_datasets(
        DataFlags(
            seq_length=8,
            train_data_path=[corpora[0]],
            valid_data_path=["1", corpora[1], "1", corpora[2]],
            test_data_path=[corpora[2]],
        ),
        PoseSampler(8, 64),
        10**6,
        60,
        40,
        test_samples=10,
    )
    assert [len(part) for part in data] == [60, 40, 10]

    def corpus_of(part):
        return {int(part[i]["tokens"][0]) // 1000 for i in range(len(part))}

    assert [corpus_of(part) for part in data] == [{0}, {1, 2}, {2}]
    for part in data[1:]:
        assert all(part[i]["position_ids"].tolist() == list(range(8)) for i in range(len(part)))


def test_nothing_is_built_for_a_split_that_nobody_reads(world, corpora):
    # The second corpus has no document for validation, and none is asked for.
    data = build(10, data_path=["1", corpora[0], "1", corpora[1]], split="60,20,20")
    assert data.valid is None and data.test is None and len(data.train) == 10


@pytest.mark.parametrize(
    "data, message",
    [
        (
            {"data_path": ["a"], "train_data_path": ["b"]},
            "--data-path and --train-data-path.*keep one",
        ),
        ({"data_path": ["a"], "data_args_path": "b"}, "--data-path and --data-args-path both name"),
        ({"data_args_path": "/nowhere/blend"}, "--data-args-path /nowhere/blend: no such file"),
        ({"train_data_path": ["a"], "split": "1,1,1"}, "--split 1,1,1 has no meaning"),
        (
            {"valid_data_path": ["0", "a", "1", "b"]},
            "--valid-data-path: weight 0.0 must be positive",
        ),
        ({"test_data_path": ["-1", "a"]}, "--test-data-path: weight -1.0 must be positive"),
        ({"train_data_path": ["0.5"]}, "--train-data-path 0.5: give 'weight prefix"),
        ({}, "--data-path is missing"),
    ],
)
def test_words_that_make_no_blend(data, message):
    with pytest.raises(ValueError, match=message):
        blends(DataFlags(**data))


def test_an_empty_file_and_a_missing_split_are_named(world, corpora, tmp_path):
    Path(tmp_path / "empty").write_text(" \n")
    with pytest.raises(ValueError, match="--data-args-path .*empty: names no corpus"):
        build(1, data_args_path=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="--valid-data-path is missing: 5 valid samples"):
        build(1, valid=5, train_data_path=corpora[:1])
