"""dataset.py against the documents' own bytes, and against corpora whose token ids are unique."""

import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import _IndexWriter

from pose_megatron.config.flags import DataFlags
from pose_megatron.data.dataset import build_datasets
from pose_megatron.positions.laws import SAMPLERS
from pose_megatron.positions.sampler import PoseSampler

ALL_TRAIN = "1,0,0"
SIZES = [40, 9, 8, 1, 17, 100, 3, 33, 8, 25]  # with L = 8: four do not fill a window


def numbered(sizes, start=0):
    """Documents whose every token says where it is: start, start + 1, ..."""
    documents = []
    for size in sizes:
        documents.append(list(range(start, start + size)))
        start += size
    return documents


def train_set(
    prefix,
    window=8,
    target=64,
    samples=1,
    vocab=10**6,
    split=ALL_TRAIN,
    short="drop",
    seed=1234,
    **sampler,
):
    paths = prefix if isinstance(prefix, list) else [prefix]
    data = DataFlags(data_path=paths, split=split, seq_length=window, short_documents=short)
    return build_datasets(
        data, PoseSampler(window, target, seed=seed, **sampler), vocab, samples, 0
    )[0]


@pytest.mark.parametrize(
    "options",
    [
        {"content": "contiguous"},
        {"content": "contiguous", "num_chunks": 5},
        {"name": "randpos"},
        {"name": "full"},
    ],
)
def test_each_token_of_a_long_document_is_an_input_once_per_epoch(world, make_corpus, options):
    documents = numbered(SIZES)
    data = train_set(make_corpus(documents), **options)
    epoch = data.sources.samples_per_epoch
    data = train_set(make_corpus(documents), samples=2 * epoch, **options)
    # Whole windows of each document, the last token only ever a label.
    expected = sorted(token for d in documents for token in d[: (len(d) - 1) // 8 * 8])
    for start in (0, epoch):
        inputs = np.concatenate([data[i]["tokens"] for i in range(start, start + epoch)])
        assert sorted(inputs.tolist()) == expected
    first = [data[i]["tokens"].tolist() for i in range(epoch)]
    second = [data[i]["tokens"].tolist() for i in range(epoch, 2 * epoch)]
    assert first != second


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("content", ["uniform", "contiguous", "aligned"])
@pytest.mark.parametrize("short", ["drop", "pack"])
def test_a_label_is_the_true_next_token_everywhere(world, make_corpus, name, content, short):
    documents = numbered(SIZES)
    following = {}
    stream = [t for d in documents if len(d) <= 8 for t in d]
    for run in [*[d for d in documents if len(d) > 8], stream]:
        following |= dict(pairwise(run))
    data = train_set(
        make_corpus(documents),
        samples=200,
        name=name,
        content=content,
        num_chunks=3,
        short=short,
        boundaries=tuple(range(0, 200, 3)),
    )
    for i in range(200):
        sample = data[i]
        assert sample["labels"].tolist() == [following[t] for t in sample["tokens"].tolist()]
        assert sample["loss_mask"].tolist() == [1] * 8
        assert {name: value.dtype for name, value in sample.items()} == {
            "tokens": np.dtype(np.int64),
            "labels": np.dtype(np.int64),
            "loss_mask": np.dtype(np.float32),
            "position_ids": np.dtype(np.int64),
        }


def test_samples_of_a_real_corpus_are_its_bytes(world, stdlib_corpus, stdlib_documents):
    window, target = 128, 4096
    data = train_set(stdlib_corpus, window, target, samples=300, vocab=257, num_chunks=4)
    raw = np.fromfile(f"{stdlib_corpus}.bin", dtype=np.uint16)
    starts = np.cumsum([0, *map(len, stdlib_documents)])
    chunk_ends = 0
    for i in range(300):
        ((document, first, length),) = data.sources[i]["source"].pieces
        plan = data.sampler.plan(i, length - 1)
        at = starts[document] + first + plan.text()
        sample = data[i]
        assert (sample["tokens"] == raw[at]).all()
        assert (sample["labels"] == raw[at + 1]).all()
        assert (sample["position_ids"] == plan.positions()).all()
        assert at[-1] + 1 < starts[document + 1]  # never beyond the document
        inner = np.cumsum(plan.lengths)[:-1]
        chunk_ends += int((sample["labels"][inner - 1] != sample["tokens"][inner]).sum())
    assert chunk_ends > 100  # at most chunk ends the label is not the next input


def test_later_chunks_come_from_further_on_in_the_same_document(world, make_corpus):
    data = train_set(make_corpus(numbered([200, 300])), samples=120, num_chunks=4)
    gaps = [int(np.diff(data[i]["tokens"]).max()) for i in range(120)]
    assert max(gaps) > 50
    for i in range(120):
        tokens = data[i]["tokens"]
        assert (np.diff(tokens) >= 1).all() and (tokens[-1] < 200) == (tokens[0] < 200)


def test_samples_do_not_depend_on_how_many_are_asked_for(world, make_corpus):
    prefix = make_corpus(numbered(SIZES))
    few, many = train_set(prefix, samples=5), train_set(prefix, samples=500)
    for i in range(5):
        for name in ("tokens", "position_ids"):
            assert few[i][name].tolist() == many[i][name].tolist()
    assert len(few) == 5 and len(many) == 500


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_sample_shares_an_array_with_another(world, make_corpus, name):
    """megatron-core's GPTDataset hands out one cached array of position ids."""
    options = {"boundaries": (3,)} if name in ("pose-boundary", "longrecipe") else {}
    data = train_set(make_corpus(numbered(SIZES)), window=12, name=name, samples=4, **options)
    before = {field: values.copy() for field, values in data[1].items()}
    for i in (0, 1):
        for values in data[i].values():
            values[:] = -7
    for field, values in data[1].items():
        assert np.array_equal(values, before[field]), field


def test_the_seed_changes_order_and_positions(world, make_corpus):
    prefix = make_corpus(numbered([500]))
    one, other = (train_set(prefix, samples=20, seed=seed) for seed in (1, 2))
    for name in ("tokens", "position_ids"):
        assert [one[i][name].tolist() for i in range(20)] != [
            other[i][name].tolist() for i in range(20)
        ]


def test_drop_counts_and_pack_covers_the_short_documents(world, make_corpus, caplog):
    documents = numbered(SIZES)
    prefix = make_corpus(documents)
    short = [d for d in documents if len(d) <= 8]
    with caplog.at_level("INFO"):
        dropping = train_set(prefix, content="contiguous")
    assert "4 short documents dropped" in caplog.text
    assert dropping.sources.dropped == len(short) == 4
    packing = train_set(prefix, content="contiguous", short="pack")
    whole = sum((len(d) - 1) // 8 for d in documents if len(d) > 8)
    stream = [token for d in short for token in d]
    packed = (len(stream) - 1) // 8
    assert dropping.sources.samples_per_epoch == whole
    assert packing.sources.samples_per_epoch == whole + packed
    packing = train_set(prefix, samples=whole + packed, content="contiguous", short="pack")
    inputs = {t for i in range(whole + packed) for t in packing[i]["tokens"].tolist()}
    assert inputs & set(stream) == set(stream[: packed * 8])


def test_packing_steps_over_empty_documents(world, make_corpus):
    prefix = make_corpus([[], [0, 1, 2], [], [], [3, 4, 5, 6], [7, 8], []])
    data = train_set(prefix, window=4, samples=2, name="full", short="pack")
    samples = sorted((data[i]["tokens"].tolist(), data[i]["labels"].tolist()) for i in range(2))
    assert samples == [([0, 1, 2, 3], [1, 2, 3, 4]), ([4, 5, 6, 7], [5, 6, 7, 8])]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12),
    st.integers(1, 9),
    st.sampled_from(["drop", "pack"]),
)
def test_an_epoch_is_every_window_exactly_once(world, tmp_path_factory, sizes, window, short):
    from tests.conftest import write_corpus

    documents = numbered(sizes)
    runs = [d for d in documents if len(d) > window]
    if short == "pack":
        runs.append([t for d in documents if len(d) <= window for t in d])
    expected = [run[i : i + window] for run in runs for i in range(0, len(run) - window, window)]
    if not expected:
        return
    prefix = write_corpus(tmp_path_factory.mktemp("c") / "corpus", documents)
    data = train_set(prefix, window, samples=len(expected), name="full", short=short)
    assert data.sources.samples_per_epoch == len(expected)
    seen = [data[i]["tokens"].tolist() for i in range(len(expected))]
    assert sorted(seen) == sorted(expected)


def test_positions_only_reads_no_token(world, make_corpus, monkeypatch):
    prefix = make_corpus(numbered(SIZES))
    data = DataFlags(data_path=[prefix], split=ALL_TRAIN, seq_length=8)
    sampler = PoseSampler(8, 64)
    whole = build_datasets(data, sampler, 10**6, 30, 0)[0]
    expected = [whole[i]["position_ids"].tolist() for i in range(30)]

    def refuse(*args, **kwargs):
        raise AssertionError("a token was read")

    bare = build_datasets(data, sampler, 10**6, 30, 0, positions_only=True)[0]
    monkeypatch.setattr(type(bare.sources.dataset.tokens), "get", refuse)
    for i in range(30):
        sample = bare[i]
        assert list(sample) == ["position_ids"]
        assert sample["position_ids"].tolist() == expected[i]
    with pytest.raises(AssertionError, match="a token was read"):
        whole[0]


def test_positions_cut_at_tokens_need_the_tokens_on_every_stage(world, make_corpus):
    data = DataFlags(data_path=[make_corpus(numbered(SIZES))], split=ALL_TRAIN, seq_length=8)
    sampler = PoseSampler(8, 64, "pose-boundary", 4, boundaries=tuple(range(0, 300, 3)))
    whole = build_datasets(data, sampler, 10**6, 30, 0).train
    bare = build_datasets(data, sampler, 10**6, 30, 0, positions_only=True).train
    for i in range(30):
        positions = bare[i]["position_ids"]
        assert list(bare[i]) == ["position_ids"]
        assert positions.tolist() == whole[i]["position_ids"].tolist()
        cut = np.flatnonzero(np.diff(positions) > 1)
        assert (whole[i]["tokens"][cut] % 3 == 0).all()
    assert any((np.diff(bare[i]["position_ids"]) > 1).any() for i in range(30))


@pytest.mark.parametrize("mode, cache", [("document", False), ("packed", False), ("packed", True)])
def test_a_million_documents_open_in_no_time(world, tmp_path, mode, cache):
    lengths = [100 + i % 100 for i in range(10**6)]
    prefix = str(tmp_path / "many")
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * sum(lengths))  # zeros that take no disk
    with _IndexWriter(f"{prefix}.idx", np.uint16) as writer:
        writer.write(lengths, None, range(len(lengths) + 1))
    data = DataFlags(
        data_path=[prefix],
        split=ALL_TRAIN,
        seq_length=64,
        data_mode=mode,
        data_cache_path=str(tmp_path / "cache") if cache else None,
    )
    start = time.process_time()
    train = build_datasets(data, PoseSampler(64, 512), 10, 10**7, 0).train
    assert [train[i]["tokens"].sum() for i in range(0, 10**7, 10**6)] == [0] * 10
    assert time.process_time() - start < 10  # a fifth of a second on a quiet machine


@pytest.mark.parametrize(
    "weights, shares",
    [
        (("3", "1"), (0.75, 0.25)),
        (("0.5", "0.5"), (0.5, 0.5)),
        ((), (400 / 500, 100 / 500)),
    ],
)
def test_a_blend_mixes_by_weight(world, make_corpus, weights, shares):
    # Ids say the corpus; without weights megatron-core mixes by size.
    first = make_corpus(numbered([401]), "first")
    second = make_corpus(numbered([101], start=1000), "second")
    words = [*sum(zip(weights, (first, second), strict=True), ())] if weights else [first, second]
    data = train_set(words, samples=60 if not weights else 400, content="contiguous")
    n = len(data)
    seen = Counter(int(data[i]["tokens"][0]) >= 1000 for i in range(n))
    for corpus, share in enumerate(shares):
        assert abs(seen[bool(corpus)] / n - share) < 0.03
    assert len({tuple(data[i]["position_ids"].tolist()) for i in range(40)}) > 30


def test_validation_is_plain_and_from_other_documents(world, make_corpus):
    documents = numbered([50] * 40)
    data = DataFlags(data_path=[make_corpus(documents)], split="80,20,0", seq_length=8)
    train, valid, _ = build_datasets(data, PoseSampler(8, 64), 10**6, 300, 40)
    assert len(valid) == 40

    def documents_of(samples):
        return {token // 50 for s in samples for token in s["tokens"].tolist()}

    held_out = [valid[i] for i in range(40)]
    for sample in held_out:
        assert sample["position_ids"].tolist() == list(range(8))
        assert (np.diff(sample["tokens"]) == 1).all()
    trained = documents_of(train[i] for i in range(300))
    assert documents_of(held_out) and not trained & documents_of(held_out)
    assert trained <= set(range(32)) and documents_of(held_out) <= set(range(32, 40))
    skipping = [train[i]["position_ids"].tolist() for i in range(300)]
    assert any(row != list(range(8)) for row in skipping)


# Bad input.


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_missing_file_is_named(world, make_corpus, ending):
    prefix = make_corpus(numbered(SIZES))
    Path(f"{prefix}.{ending}").unlink()
    with pytest.raises(ValueError, match=rf"--data-path {prefix}: {prefix}\.{ending} is missing"):
        train_set(prefix)


@pytest.mark.parametrize("left", [0, 1, 50, -1, -2])
def test_a_truncated_bin_is_named(world, make_corpus, left):
    prefix = make_corpus(numbered(SIZES))
    path = Path(f"{prefix}.bin")
    content = path.read_bytes()
    path.write_bytes(content[:left])
    with pytest.raises(
        ValueError,
        match=rf"{prefix}\.bin has \d+ bytes, its index describes "
        rf"{len(content)}: truncated",
    ):
        train_set(prefix)


def test_a_bin_of_another_corpus_is_an_error(world, make_corpus):
    prefix, other = make_corpus(numbered(SIZES)), make_corpus(numbered([9]), "other")
    Path(f"{other}.bin").replace(f"{prefix}.bin")
    with pytest.raises(ValueError, match="truncated or from another corpus"):
        train_set(prefix)


@pytest.mark.parametrize("left", [0, 5, 9, 17, 18, 26, 34, 60, -8, -1])
def test_a_truncated_idx_is_named(world, make_corpus, left):
    prefix = make_corpus(numbered(SIZES))
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(
        ValueError,
        match=rf"--data-path {prefix}: {prefix}\.idx is truncated or "
        "not a Megatron index",
    ):
        train_set(prefix)


def test_an_idx_that_is_something_else_is_named(world, make_corpus):
    prefix = make_corpus(numbered(SIZES))
    Path(f"{prefix}.idx").write_text("a text file, not an index of documents and their lengths")
    with pytest.raises(ValueError, match="not a Megatron index"):
        train_set(prefix)


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_an_empty_corpus_is_an_error(world, make_corpus, documents):
    prefix = make_corpus(documents)
    with pytest.raises(ValueError, match=f"--data-path {prefix}: the corpus has no tokens"):
        train_set(prefix)


def test_nothing_long_enough_says_how_long_the_longest_is(world, make_corpus):
    prefix = make_corpus(numbered([8, 3, 1]))
    with pytest.raises(
        ValueError,
        match=r"none of its 3 train documents fills --seq-length 8 \+ 1 "
        r"tokens \(the longest has 8\).*--short-documents pack",
    ):
        train_set(prefix)
    assert len(train_set(prefix, short="pack")) == 1  # the way out
    assert len(train_set(prefix, window=7, samples=3)) == 3
    with pytest.raises(ValueError, match="none of its 3 train documents"):
        train_set(prefix, window=12, short="pack")


@pytest.mark.parametrize("vocab", [161, 110])
def test_a_token_outside_the_vocabulary_names_corpus_and_document(world, make_corpus, vocab):
    # 161 occurs only as the label of 160, in the last of seven windows.
    prefix = make_corpus([list(range(60)), list(range(105, 162))])
    with pytest.raises(
        ValueError,
        match=rf"--data-path {prefix}: token id 1\d\d in document 1 is "
        rf"outside the vocabulary of {vocab}",
    ):
        data = train_set(prefix, samples=14, vocab=vocab, content="contiguous")
        [data[i] for i in range(14)]
    data = train_set(prefix, samples=14, vocab=162, content="contiguous")
    assert max(int(data[i]["labels"].max()) for i in range(14)) == 161


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_negative_token_is_outside_the_vocabulary(world, make_corpus, dtype):
    prefix = make_corpus([[1, 2, -3, 4, 5, 6, 7, 8, 9]], dtype=dtype)
    with pytest.raises(ValueError, match="token id -3 in document 0 is outside the vocabulary"):
        train_set(prefix)[0]


@pytest.mark.parametrize(
    "split", ["", "1", "1,1", "1,1,1,1", "0,0,0", "-1,1,1", "a,b,c", "nan,1,1", "inf,1,1"]
)
def test_a_bad_split_is_an_error(world, make_corpus, split):
    with pytest.raises(ValueError, match="--split .*must be three shares"):
        train_set(make_corpus(numbered(SIZES)), split=split)


def test_a_split_without_training_documents_is_an_error(world, make_corpus):
    prefix = make_corpus(numbered([20] * 10))
    with pytest.raises(ValueError, match="--split 0,1,0 leaves no train documents"):
        train_set(prefix, split="0,1,0")
    data = DataFlags(data_path=[prefix], split=ALL_TRAIN, seq_length=8)
    with pytest.raises(ValueError, match="--split 1,0,0 leaves no valid documents"):
        build_datasets(data, PoseSampler(8, 64), 10**6, 10, 10)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--data-path is missing"),
        (["0.5"], "give 'weight prefix"),
        (["0.5", "a", "0.5"], "give 'weight prefix"),
        (["0", "a", "1", "b"], "weight 0.0 must be positive"),
        (["-1", "a"], "weight -1.0 must be positive"),
        (["nan", "a"], "weight nan must be positive"),
        (["inf", "a", "1", "b"], "weight inf must be positive"),
    ],
)
def test_bad_blends_are_errors(world, words, message):
    with pytest.raises(ValueError, match=message):
        train_set(words)
