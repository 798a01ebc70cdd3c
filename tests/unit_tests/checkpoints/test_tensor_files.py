"""tensor_files.py against the libraries whose files it reads and writes."""

import json
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pose_megatron.checkpoints.tensor_files import SafetensorsWriter, read_safetensors, read_torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=5),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
    min_size=1,
    max_size=6,
)


def make(specs):
    return {
        name: torch.randint(0, 2, shape).to(dtype) * 3 for name, (dtype, shape) in specs.items()
    }


def read(stored):
    found = {name: torch.empty(s.shape, dtype=s.dtype) for name, s in stored.items()}
    for name, s in stored.items():
        s.read(found[name])
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@given(TENSORS)
@settings(max_examples=40, deadline=None)
def test_what_the_library_writes_is_read(tmp_path_factory, specs):
    path, tensors = tmp_path_factory.mktemp("t") / "x", make(specs)
    safetensors.torch.save_file(tensors, path)
    assert_same(read(read_safetensors(path)), tensors)
    torch.save(tensors, path)
    assert_same(read(read_torch(path)), tensors)


@given(TENSORS, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_what_is_written_the_library_reads(tmp_path_factory, specs, random):
    path, tensors = tmp_path_factory.mktemp("t") / "x", make(specs)
    writer = SafetensorsWriter(path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()})
    for name in random.sample(sorted(tensors), len(tensors)):  # in any order
        writer.put(name, tensors[name])
    writer.close()
    assert_same(safetensors.torch.load_file(path), tensors)
    assert_same(read(read_safetensors(path)), tensors)


def test_parts_and_views(tmp_path):
    whole = torch.arange(24.0).view(6, 4)
    torch.save({"rows": whole[2:4], "again": whole}, tmp_path / "x")  # one storage, twice
    stored = read_torch(tmp_path / "x")
    assert torch.equal(read(stored)["rows"], whole[2:4])
    assert torch.equal(read(stored)["again"], whole)
    torch.save({"t": whole.T}, tmp_path / "y")
    with pytest.raises(ValueError, match="t is not stored contiguously"):
        read_torch(tmp_path / "y")


@pytest.mark.parametrize("rows", [1, 4, 2500])
def test_pieces(tmp_path, rows):
    """Also more of them than one call of the operating system takes, which is 1024."""
    whole = torch.arange(2500 * 7, dtype=torch.int16).view(2500, 7)
    writer = SafetensorsWriter(
        tmp_path / "x", {"first": (torch.int8, (5,)), "t": (torch.int16, (2500, 7))}
    )
    writer.put("t", *whole.split(rows))
    writer.put("first", torch.ones(5, dtype=torch.int8))
    writer.close()
    assert torch.equal(safetensors.torch.load_file(tmp_path / "x")["t"], whole)
    pieces = torch.zeros(5000, 7, dtype=torch.int16).split(rows)  # every other one is filled
    read_safetensors(tmp_path / "x")["t"].read(*pieces[::2])
    assert torch.equal(torch.cat(pieces[::2])[:2500], whole)
    assert not torch.cat(pieces[1::2]).any()


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        *(torch.float8_e8m0fnu, torch.complex64, torch.uint16, torch.uint32, torch.uint64),
        *(torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32),
    ],
)
def test_every_dtype_of_the_library_is_known(tmp_path, dtype):
    content = torch.arange(24, dtype=torch.uint8).view(dtype)
    safetensors.torch.save_file({"a": content}, tmp_path / "x")
    (found,) = read(read_safetensors(tmp_path / "x")).values()
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), content.view(torch.uint8))


def header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def entry(begin, end, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "header does not fit"),
        (struct.pack("<Q", 1 << 40) + b"{}", "header does not fit"),
        (header(b"{nonsense"), "header unreadable"),
        (header(b"[1]"), "header unreadable"),
        (header(json.dumps({"a": entry(0, 8, "F3")}).encode()) + bytes(8), "header unreadable"),
        (
            header(json.dumps({"a": entry(0, 1, "F4")}).encode()) + bytes(1),
            "a is stored as F4, and",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run git lfs pull"),
        (
            header(json.dumps({"a": entry(0, 8)}).encode()) + bytes(7),
            "damaged or cut off: .* bytes",
        ),
        (
            header(json.dumps({"a": entry(0, 8)}).encode()) + bytes(9),
            "damaged or cut off: .* bytes",
        ),
        (header(json.dumps({"a": entry(4, 12)}).encode()) + bytes(12), "a gap or an overlap"),
        (
            header(json.dumps({"a": entry(0, 8), "b": entry(4, 12)}).encode()) + bytes(12),
            "a gap or an overlap",
        ),
    ],
)
def test_damaged_safetensors(tmp_path, content, words):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read_safetensors(tmp_path / "x")
    assert str(tmp_path / "x") in str(error.value)


class Evil:
    """What runs code when it is unpickled without care."""

    def __reduce__(self):
        return exec, ("raise SystemExit('pwned')",)


def test_torch_files_that_are_not_tensors_by_name(tmp_path):
    path = tmp_path / "x"
    for content in ({"a": Evil()}, {"a": torch.ones(1), "b": Evil()}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="is damaged, or holds more than tensors"):
            read_torch(path)
    for content in ([torch.ones(1)], {"a": 1}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="does not hold tensors by name"):
            read_torch(path)
    torch.save({"a": torch.ones(999)}, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="is damaged, or holds more"):
        read_torch(path)
    torch.save({"a": torch.ones(9)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="torch's format of before 1.6"):
        read_torch(path)


def test_a_file_that_shrinks_meanwhile(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(999)}, tmp_path / "x")
    stored = read_safetensors(tmp_path / "x")
    with open(tmp_path / "x", "r+b") as file:
        file.truncate(500)
    with pytest.raises(ValueError, match="x is cut off: it ends at byte 500"):
        read(stored)
