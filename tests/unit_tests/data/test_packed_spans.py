"""Packed mode against the documents themselves: whose tokens say where they are."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pose_megatron.config.flags import DataFlags
from pose_megatron.data.dataset import build_datasets
from pose_megatron.positions.sampler import PoseSampler

SIZES = [40, 9, 0, 8, 1, 17, 100, 0, 3, 33, 8, 25]


def numbered(sizes):
    ends = np.cumsum(sizes)
    return [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]


def packed(prefix, samples=1, window=8, target=64, skips="document", cache=None, **sampler):
    data = DataFlags(
        data_path=[prefix],
        split="1,0,0",
        seq_length=window,
        data_mode="packed",
        packed_skips=skips,
        data_cache_path=cache,
    )
    return build_datasets(data, PoseSampler(window, target, **sampler), 10**6, samples, 0).train


def an_epoch(prefix, epoch=0, window=8, **options):
    """Its samples, in the order of the stream."""
    n = packed(prefix, window=window, **options).sources.samples_per_epoch
    data = packed(prefix, samples=(epoch + 1) * n, window=window, **options)
    samples = [data[epoch * n + i] for i in range(n)]
    return [samples[i] for i in np.argsort([data.sources._shuffle[i] for i in range(n)])]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda s: sum(s) > 8),
    st.integers(1, 7),
    st.integers(0, 3),
    st.integers(0, 99),
)
def test_an_epoch_is_the_stream_of_all_documents(world, make_corpus, sizes, window, epoch, seed):
    documents = numbered(sizes)
    samples = an_epoch(make_corpus(documents), epoch, window=window, num_chunks=1, seed=seed)
    tokens = sum(sizes)
    assert len(samples) == (tokens - 1) // window
    stream = [t for sample in samples for t in sample["tokens"].tolist()]
    stream.append(int(samples[-1]["labels"][-1]))
    # Each label is the next token of the stream, also where a window or a document ends.
    assert [t for sample in samples for t in sample["labels"].tolist()] == stream[1:]
    # The stream is whole documents, each once; the last may be cut by the end of the epoch.
    order = []
    while stream:
        document = next(d for d in documents if d and d[0] == stream[0])
        assert stream[: len(document)] == document[: len(stream)]
        order.append(document[0])
        stream = stream[len(document) :]
    assert len(set(order)) == len(order)


def test_documents_and_windows_have_a_new_order_every_epoch(world, make_corpus):
    prefix = make_corpus(numbered([20] * 30))
    firsts = [
        [int(s["tokens"][0]) for s in an_epoch(prefix, epoch, content="contiguous")]
        for epoch in (0, 1)
    ]
    assert firsts[0] != firsts[1]
    data = packed(prefix, samples=100, content="contiguous")
    walked = [int(data[i]["tokens"][0]) for i in range(data.sources.samples_per_epoch)]
    assert walked != firsts[0] and sorted(walked) == sorted(firsts[0])


@pytest.mark.parametrize("content", ["uniform", "aligned", "contiguous"])
def test_a_text_skip_never_crosses_a_document(world, make_corpus, content):
    documents = numbered(SIZES)
    inside = {
        pair for d in documents for pair in ((a, b) for i, a in enumerate(d) for b in d[i + 1 :])
    }
    follows = {
        pair
        for epoch in range(6)
        for s in an_epoch(make_corpus(documents), epoch, content="contiguous")
        for pair in zip(s["tokens"].tolist(), s["labels"].tolist(), strict=True)
    }
    data = packed(make_corpus(documents), samples=180, content=content, num_chunks=3)
    jumps = 0
    for i in range(180):
        sample = data[i]
        tokens, labels = sample["tokens"].tolist(), sample["labels"].tolist()
        assert all(pair in follows or pair in inside for pair in zip(tokens, labels, strict=True))
        for a, b in pairwise(tokens):
            if (a, b) not in follows and b != a + 1:
                assert (a, b) in inside
                jumps += 1
    assert (jumps > 20) == (content != "contiguous")
    assert any((np.diff(data[i]["position_ids"]) > 1).any() for i in range(180))


def test_when_asked_the_text_skips_along_the_stream(world, make_corpus):
    documents = numbered([20] * 50)
    data = packed(make_corpus(documents), samples=200, target=300, skips="stream", num_chunks=3)
    crossed = reach = 0
    for i in range(200):
        source = data.sources[i]["source"]
        assert source.length <= 300
        reach = max(reach, source.length)
        tokens = data[i]["tokens"].tolist()
        crossed += len({t // 20 for t in tokens}) > 2  # 8 neighbours lie in at most 2 documents
        assert len(set(tokens)) == 8
    assert crossed > 100 and reach == 300


def test_a_window_in_one_document_may_draw_from_all_of_the_rest(world, make_corpus):
    data = packed(make_corpus(numbered([1000])), samples=124, num_chunks=4)
    gaps = [int(np.diff(data[i]["tokens"]).max()) for i in range(124)]
    assert max(gaps) > 300
    assert all(
        data.sources[i]["source"].length == 999 - start
        for i in range(124)
        for start in [int(data[i]["tokens"][0])]
    )


def test_the_cache_changes_nothing(world, make_corpus, tmp_path):
    prefix, cache = make_corpus(numbered(SIZES)), str(tmp_path / "cache")
    plain = packed(prefix, samples=90, num_chunks=3)
    filling = packed(prefix, samples=90, num_chunks=3, cache=cache)
    for i in range(90):
        assert filling[i]["tokens"].tolist() == plain[i]["tokens"].tolist()
    reading = packed(prefix, samples=90, num_chunks=3, cache=cache)
    assert isinstance(reading[0] and reading.sources._stream[1].ends, np.memmap)
    for i in range(90):
        assert reading[i]["tokens"].tolist() == plain[i]["tokens"].tolist()


def test_too_few_tokens_name_the_way_out(world, make_corpus):
    with pytest.raises(
        ValueError,
        match=r"its 3 train documents have 8 tokens, which do not fill "
        r"--seq-length 8 \+ 1",
    ):
        packed(make_corpus(numbered([3, 0, 5])))
    assert len(packed(make_corpus(numbered([3, 0, 6])))) == 1
