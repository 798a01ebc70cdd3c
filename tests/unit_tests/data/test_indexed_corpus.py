"""corpus.py on files that are not what they should be, and on documents of every length."""

import struct
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, _IndexWriter

from pose_megatron.config.flags import DataFlags
from pose_megatron.data.dataset import build_datasets
from pose_megatron.data.indexed_corpus import IndexedCorpus
from pose_megatron.data.source import Source
from pose_megatron.positions.sampler import PoseSampler

HEADER = 9 + 8 + 1 + 8 + 8  # magic, version, type, two counts


def train_set(prefix, samples=20, window=8, vocab=10**6, **data):
    flags = DataFlags(data_path=[prefix], split="1,0,0", seq_length=window, **data)
    return build_datasets(flags, PoseSampler(window, 2048), vocab, samples, 0).train


@pytest.fixture
def corpus(make_corpus) -> str:
    return make_corpus([list(range(n)) for n in (30, 20, 50)])


def overwrite(prefix: str, at: int, content: bytes) -> None:
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(at)
        file.write(content)


@pytest.mark.parametrize(
    "at, content, message",
    [
        (HEADER, struct.pack("<i", -30), "a document has a negative length"),
        (HEADER + 4, struct.pack("<i", 21), "its documents do not adjoin"),
        (HEADER + 12 + 8, struct.pack("<q", 62), "its documents do not adjoin"),
        (HEADER + 12, struct.pack("<q", -8), "its documents do not adjoin"),
        (HEADER + 12 + 24 + 24, struct.pack("<q", 2), "its tables disagree"),
        (0, b"MMIDIDY", "not an index of megatron-core"),
        (9, struct.pack("<Q", 2), "unknown version"),
        (17, b"\x63", "unknown version"),
        (18, struct.pack("<Q", 2**40), "are due"),
    ],
)
def test_each_way_an_index_is_corrupt_is_an_error(corpus, at, content, message):
    overwrite(corpus, at, content)
    with pytest.raises(
        ValueError,
        match=rf"--data-path {corpus}: {corpus}\.idx is truncated or "
        rf"not a Megatron index \(.*{message}.*\); preprocess",
    ):
        IndexedCorpus(corpus)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_that_are_no_tokens_are_an_error(tmp_path, dtype):
    prefix = str(tmp_path / "floats")
    np.zeros(30, dtype).tofile(f"{prefix}.bin")
    with _IndexWriter(f"{prefix}.idx", dtype) as writer:
        writer.write([30], None, [0, 1])
    with pytest.raises(ValueError, match=f"its values are {np.dtype(dtype).name}, not token ids"):
        IndexedCorpus(prefix)


def test_the_index_of_another_type_is_an_error(corpus):
    overwrite(corpus, 17, bytes([DType.code_from_dtype(np.int32)]))  # it says 4 bytes, not 2
    with pytest.raises(ValueError, match="do not adjoin"):
        IndexedCorpus(corpus)


def test_the_index_of_another_corpus_is_an_error(corpus, make_corpus):
    other = make_corpus([list(range(99))], "other")
    Path(f"{other}.idx").replace(f"{corpus}.idx")
    with pytest.raises(
        ValueError,
        match=r"corpus\.bin has 200 bytes, its index describes 198: "
        "truncated or from another corpus",
    ):
        IndexedCorpus(corpus)


def test_the_flag_that_named_it_is_in_the_message(tmp_path):
    with pytest.raises(ValueError, match=r"--materialized .*none: .*none\.idx is missing"):
        IndexedCorpus(str(tmp_path / "none"), "--materialized")


@pytest.mark.parametrize("mode", ["document", "packed"])
def test_empty_documents_are_passed_over(world, make_corpus, mode):
    sizes = [0, 0, 30, 0, 20, 0, 0, 50, 0]
    ends = np.cumsum(sizes)
    prefix = make_corpus([list(range(end - n, end)) for n, end in zip(sizes, ends, strict=True)])
    data = train_set(prefix, samples=60, data_mode=mode, short_documents="pack")
    seen = {t for i in range(60) for t in data[i]["tokens"].tolist()}
    assert len(seen) > 80 and max(seen) < 100


@pytest.mark.parametrize("mode", ["document", "packed"])
def test_one_enormous_document_is_drawn_from_to_its_end(world, tmp_path, mode):
    tokens, prefix = 6_000_000, str(tmp_path / "huge")
    np.arange(tokens, dtype=np.int32).tofile(f"{prefix}.bin")
    with _IndexWriter(f"{prefix}.idx", np.int32) as writer:
        writer.write([tokens], None, [0, 1])
    data = train_set(prefix, samples=400, window=1024, vocab=tokens, data_mode=mode)
    assert data.sources.samples_per_epoch == (tokens - 1) // 1024
    first = [int(data[i]["tokens"][0]) for i in range(400)]
    last = [int(data[i]["labels"][-1]) for i in range(400)]
    assert len(set(first)) == 400 and all(f % 1024 == 0 for f in first)
    assert min(first) < tokens / 50 and max(last) > tokens * 0.98
    assert all((data[i]["labels"] == data[i]["tokens"] + 1).all() for i in range(400))


def test_a_stretch_over_pieces_reads_them_end_to_end(corpus):
    source = Source(IndexedCorpus(corpus), ((0, 25, 5), (1, 0, 20), (2, 10, 40)))
    whole = [*range(25, 30), *range(20), *range(10, 50)]
    assert source.length == 64
    for start in range(64):
        for length in range(1, 65 - start, 7):
            assert source.tokens(start, length).tolist() == whole[start : start + length]
