"""The .bin and .idx byte for byte as stock megatron-core writes them, and read back by it."""

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from pose_megatron.preprocessing import indexed_writer
from pose_megatron.preprocessing.indexed_writer import (
    IndexedReader,
    IndexedWriter,
    join,
    publish,
    token_dtype,
)


def patch(path, at, value, form):
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, at, value)
    path.write_bytes(content)


DOCUMENTS = st.lists(st.lists(st.integers(0, 65499), max_size=5), min_size=1, max_size=12)


def stock(prefix, documents, dtype=np.uint16):
    """(.bin, .idx) of megatron-core's builder, called as Megatron-LM does."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")
    return content(prefix)


def content(prefix):
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def append(writer, folder, documents):
    """From a file and from an array, in turn."""
    ids = np.concatenate([[], *documents]).astype(writer.dtype)
    if writer.size.documents % 2:
        ids.tofile(folder / "ids")
        ids = folder / "ids"
    lengths = np.array([len(d) for d in documents], np.int64)
    writer.append(ids, lengths[lengths > 0], np.cumsum(lengths > 0))


@pytest.mark.parametrize("vocab_size", [2, 65499, 65500, 200_000])
def test_ids_have_megatrons_type(vocab_size):
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_bytes_are_megatron_cores_however_they_come(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(indexed_writer, "BLOCK", 3)

    @settings(max_examples=60, deadline=None)
    @given(DOCUMENTS.filter(any), st.integers(1, 12), st.integers(0, 12))
    def holds(documents, step, crash):
        writer = IndexedWriter(tmp_path, "x", dtype)
        for start in range(0, len(documents), step):
            append(writer, tmp_path, documents[start : start + step])
            if start == crash:  # more than was synced is in the files
                writer.flush()
                size = dataclasses.replace(writer.size)
                append(writer, tmp_path, [[1, 2, 3]])
                writer.close()
                writer = IndexedWriter(tmp_path, "x", dtype, size)
        writer.finish()
        writer.close()
        publish(tmp_path, "x", str(tmp_path / "ours"))
        assert content(tmp_path / "ours") == stock(tmp_path / "stock", documents, dtype)
        read = IndexedDataset(str(tmp_path / "ours"))
        assert [read[i].tolist() for i in range(len(read))] == [d for d in documents if d]
        assert writer.size == IndexedReader(str(tmp_path / "ours")).size

    holds()


def test_joining_is_writing_all_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed_writer, "BLOCK", 3)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(DOCUMENTS, min_size=1, max_size=4).filter(lambda shards: any(map(any, shards))))
    def holds(shards):
        prefixes = []
        for i, documents in enumerate(shards):
            prefixes.append(str(tmp_path / f"shard{i}"))
            stock(prefixes[-1], documents)
        size = join(prefixes, tmp_path, "joined")
        publish(tmp_path, "joined", str(tmp_path / "out"))
        together = [document for documents in shards for document in documents]
        assert content(tmp_path / "out") == stock(tmp_path / "stock", together)
        assert (size.tokens, size.documents) == (sum(map(len, together)), len(together))

    holds()


def test_documents_of_several_sequences_are_joined_too(tmp_path):
    """Megatron-LM's --split-sentences writes them."""
    builder = IndexedDatasetBuilder(f"{tmp_path}/a.bin", dtype=np.uint16)
    together = IndexedDatasetBuilder(f"{tmp_path}/stock.bin", dtype=np.uint16)
    for one in (builder, together):
        one.add_document([1, 2, 3, 4], [1, 3])
        one.add_document([5], [1])
    builder.finalize(f"{tmp_path}/a.idx")
    together.add_index(f"{tmp_path}/a")
    together.finalize(f"{tmp_path}/stock.idx")
    join([f"{tmp_path}/a", f"{tmp_path}/a"], tmp_path, "joined")
    publish(tmp_path, "joined", f"{tmp_path}/out")
    assert content(tmp_path / "out")[1] == content(tmp_path / "stock")[1]
    assert content(tmp_path / "out")[0] == content(tmp_path / "a")[0] * 2


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda b, i: b.unlink(), r"a\.bin: no such file"),
        (
            lambda b, i: b.write_bytes(b.read_bytes()[:-2]),
            r"a\.bin has 8 bytes, its index describes 10: truncated",
        ),
        (lambda b, i: i.write_bytes(i.read_bytes()[:-8]), r"a\.idx: has .* bytes where .* are due"),
        (lambda b, i: i.write_bytes(b"MMID"), r"a\.idx: not an index of megatron-core"),
        (
            lambda b, i: i.write_bytes(i.read_bytes()[:17] + b"\x63" + i.read_bytes()[18:]),
            r"a\.idx: index of an unknown version",
        ),
        (lambda b, i: i.write_bytes(i.read_bytes() + bytes(2)), r"a\.idx: a multimodal index"),
        (lambda b, i: patch(i, 34, -3, "<i"), "a document has a negative length"),
        (lambda b, i: patch(i, 42, 1 << 40, "<q"), "its documents do not adjoin"),
        (lambda b, i: patch(i, 58, 1, "<q"), "its tables disagree"),
        (lambda b, i: patch(i, 66, 9, "<q"), "its documents are not in order"),
        (lambda b, i: patch(i, 17, 7, "B"), "its values are float32, not token ids"),
        (lambda b, i: stock(b.with_suffix(""), [[1, 2]], np.int32), "ids are uint16, in .* int32"),
    ],
)
def test_damaged_shards_are_named(tmp_path, damage, message):
    for name in "ab":
        stock(tmp_path / name, [[1, 2, 3], [4, 5]])
    damage(tmp_path / "a.bin", tmp_path / "a.idx")
    with pytest.raises(ValueError, match=message):
        join([f"{tmp_path}/a", f"{tmp_path}/b"], tmp_path, "joined")


def test_a_document_beyond_the_format_is_refused(tmp_path):
    writer = IndexedWriter(tmp_path, "x", np.uint16)
    with pytest.raises(ValueError, match="a document of 2,147,483,648 tokens.*split it"):
        writer.append(tmp_path / "ids", np.array([1 << 31]), np.array([1]))
    writer.close()


def test_a_file_of_ids_that_is_cut_short_is_named(tmp_path):
    writer = IndexedWriter(tmp_path, "x", np.uint16)
    (tmp_path / "ids").write_bytes(bytes(8))
    with pytest.raises(ValueError, match=r"ids: has 8 bytes where 10 are due; it changed"):
        writer.append(tmp_path / "ids", np.array([3, 2]), np.array([1, 2]))
    writer.close()
