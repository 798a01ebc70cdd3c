"""Corpora on disk: every line once, whatever its file and wherever it is cut; bad files."""

import gzip
import io
import itertools
import json
import os
import resource
import sysconfig
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pose_megatron.preprocessing import readers
from pose_megatron.preprocessing.jsonl import LineError, Lines, parse_line, read_lines, read_range
from pose_megatron.preprocessing.readers import Cursor, corpus_files, parts, sample, texts

TEXTS = [
    (Path(sysconfig.get_path("stdlib")) / name).read_text("utf-8")
    for name in ("argparse.py", "heapq.py", "textwrap.py")
]


def _compress(name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(content)
    if name.endswith(".zst"):  # two frames, as parallel compressors write
        frame = zstandard.ZstdCompressor().compress
        return frame(content[:7]) + frame(content[7:])
    return content


BYTES = st.binary(max_size=200).map(lambda content: content.replace(b"a", b"\n"))


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst"])
def test_read_lines_gives_whole_lines_in_order(tmp_path, name):
    @settings(max_examples=60, deadline=None)
    @given(BYTES, st.integers(1, 50))
    def holds(content, size):
        path = tmp_path / name
        path.write_bytes(_compress(name, content))
        runs = list(read_lines(path, size))
        assert b"".join(run.content for run in runs) == content
        assert all(run.content.endswith(b"\n") for run in runs[:-1])
        positions = [0, *(run.position for run in runs), path.stat().st_size]
        assert positions == sorted(positions)

    holds()


def test_ranges_give_every_line_once_wherever_they_are_cut(tmp_path):
    path = tmp_path / "c.jsonl"

    @settings(max_examples=200, deadline=None)
    @given(BYTES, st.sets(st.integers(1, 220)))
    def holds(content, cuts):
        path.write_bytes(content)
        edges = [0, *sorted(cuts), 221]
        runs = [read_range(path, *span).content for span in itertools.pairwise(edges)]
        starts = [0, *(i + 1 for i, byte in enumerate(content) if byte == ord("\n"))]
        lines = io.BytesIO(content).readlines()
        for span, run in zip(itertools.pairwise(edges), runs, strict=True):
            theirs = [line for at, line in zip(starts, lines, strict=False) if at in range(*span)]
            assert run == b"".join(theirs)

    holds()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=()), max_size=12)
        | st.integers()
        | st.none()
        | st.floats(),
        max_size=4,
    ),
    st.booleans(),
)
def test_lines_are_what_pythons_json_reads(values, ascii_only):
    rows = [{"t": value, "other": "x"} for value in values]
    lines = [
        json.dumps(row, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass") for row in rows
    ]
    content = b"\n \r\n".join([*lines, b'["t"]'])
    read = dict(Lines(content, 0).texts(["t"]))
    assert list(read) == [1 + 2 * i for i in range(len(rows) + 1)]
    for value, line, texts_read in zip(values, lines, read.values(), strict=False):
        try:
            line.decode()
        except UnicodeDecodeError:
            assert "not UTF-8" in str(texts_read)
            continue
        if isinstance(value, str):
            assert texts_read == [json.loads(line)["t"]]
        else:
            assert isinstance(texts_read, LineError) and "not a string" in str(texts_read)
    assert "not a JSON object" in str(read[1 + 2 * len(rows)])


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.jsonl.zst"])
def test_broken_compression_is_an_error(tmp_path, name):
    path = tmp_path / name
    whole = _compress(name, TEXTS[0].encode())
    for broken in (whole[:-5], whole[: len(whole) // 2], b"not compressed"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"{name}: broken"):
            list(read_lines(path, 1000))


@pytest.mark.parametrize("log, threads", [(28, 0), (31, 2)])
def test_windows_above_those_that_zstd_takes_by_default_are_read(tmp_path, log, threads):
    parameters = zstandard.ZstdCompressionParameters(
        window_log=log, enable_ldm=True, threads=threads
    )
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path, lines = tmp_path / "c.jsonl.zst", b"".join(b'{"text": "%d"}\n' % i for i in range(10_000))
    path.write_bytes(frame.compress(lines) + frame.flush())  # of unknown size: the window counts
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
    assert corpus_files([path]) == [path]
    assert list(texts([path], ["text"], "stop")) == [str(i) for i in range(10_000)]
    # The byte after the magic number and the frame's header says how large the window is.
    wider = bytearray(path.read_bytes())
    wider[5] = (32 - 10) << 3
    path.write_bytes(wider)
    with pytest.raises(ValueError, match=r"c\.jsonl\.zst: zstd needs more than 2 GiB .*--long=31"):
        corpus_files([path])


def test_zstd_frames_end_anywhere_and_may_be_skippable(tmp_path):
    frame, skipped = zstandard.ZstdCompressor().compress, b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    path, line = tmp_path / "c.jsonl.zst", b'{"text": "a b"}\n'
    whole = b"".join(frame(line * n) for n in range(300))
    path.write_bytes(skipped + whole + skipped + frame(b""))
    assert len(list(texts([path], ["text"], "stop"))) == sum(range(300))
    for rest in (skipped[:-1], frame(line)[:-1], b"\0" * 9):
        path.write_bytes(whole + rest)
        with pytest.raises(ValueError, match=r"c\.jsonl\.zst: broken zstd file"):
            list(texts([path], ["text"], "stop"))


ROWS = [{"text": "a"}, {"text": "b\u00e9"}]


@pytest.mark.parametrize("name", ["c.json", "c.jsonl", "c.json.gz", "c.jsonl.zst"])
@pytest.mark.parametrize(
    "content, message",
    [
        (json.dumps(ROWS), "is one JSON array, .*one object a line; jq -c '.*' makes them"),
        (json.dumps(ROWS, indent=1), "is one JSON array"),
        ("\ufeff\r\n" + json.dumps(ROWS, indent="\t"), "is one JSON array"),
        (json.dumps(["a", "b"]) + "\n\n", "is one JSON array"),
        ("[]", "is one JSON array"),
        (json.dumps(ROWS * 20_000), "is one JSON array"),
        (json.dumps(ROWS).replace("}, {", "},\n{"), "is one JSON array"),
        (json.dumps(ROWS[0], indent=2), "has objects over several lines, .*jq -c . makes"),
        ("\n".join(json.dumps(row, indent=4) for row in ROWS), "has objects over several lines"),
        (json.dumps(ROWS[0], indent=2).replace("\n", "\r\n"), "has objects over several lines"),
    ],
)
def test_json_that_is_not_one_object_a_line_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(_compress(name, content.encode()))
    with pytest.raises(ValueError, match=f"--input .*{name}: {message}"):
        corpus_files([path])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_are_named(tmp_path, encoding):
    path = tmp_path / "c.jsonl"
    path.write_bytes('{"text": "a"}\n'.encode(encoding))
    with pytest.raises(ValueError, match=r"c\.jsonl: is in UTF-16 or UTF-32; make it UTF-8"):
        corpus_files([path])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"\xef\xbb\xbf" + b'{"text": "a"}\r\n' * 2,
        b'["text"]\n{"text": "a"}\n',  # the first line is wrong, not the file
        b'{oops\n{"text": "a"}\n',
        b"\0\0\0\0",
    ],
)
def test_lines_that_are_wrong_alone_are_left_to_the_reader(tmp_path, content):
    path = tmp_path / "c.jsonl"
    path.write_bytes(content)
    assert corpus_files([path]) == [path]
    assert list(texts([path], ["text"], "skip")) == ["a"] * content.count(b'"a"')


def test_a_pointer_in_place_of_a_file_is_named(tmp_path):
    for name in ("c.jsonl", "c.jsonl.zst", "c.parquet"):
        path = tmp_path / name
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer"):
            corpus_files([path])


def test_corpus_files_names_the_offender(tmp_path):
    good, bad = tmp_path / "a.jsonl", tmp_path / "b.txt"
    good.touch()
    bad.touch()
    assert corpus_files([str(good)]) == [good]
    with pytest.raises(ValueError, match=r"b\.txt: unknown extension, use one of \.jsonl"):
        corpus_files([good, bad])
    with pytest.raises(ValueError, match=r"c\.jsonl: no such file"):
        corpus_files([good, tmp_path / "c.jsonl"])


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8 .byte 10"),
        (b"[" * 100_000, "not JSON"),
        (b'["text"]', "not a JSON object .its type is list"),
        (b'{"body": "a", "id": 1}', "lacks key 'text' .it has body, id"),
        (b'{"text": null}', "value of 'text' is not a string .its type is NoneType"),
    ],
)
def test_parse_line_says_what_is_wrong(line, message):
    with pytest.raises(LineError, match=message):
        parse_line(line, ["text"])


def test_parse_line_takes_keys_in_order_and_a_byte_order_mark():
    assert parse_line(b'\xef\xbb\xbf{"a": "1", "b": "\\u0000"}\r', ["b", "a"]) == ["\0", "1"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The same 200 numbered documents in files of every kind; with parts of some 500 bytes."""
    monkeypatch.setattr(readers, "PART_BYTES", 500)
    monkeypatch.setattr(readers, "PARQUET_ROWS", 7)
    rows = [{"n": str(i), "text": f"{i} " + "x" * (i % 90)} for i in range(200)]
    lines = [json.dumps(row).encode() + b"\n" * (1 + i % 2) for i, row in enumerate(rows)]
    lines[31] = json.dumps({"n": "31", "text": "31 " + "y" * 2000}).encode() + b"\n"  # over parts
    rows[31]["text"] = json.loads(lines[31])["text"]
    found = []
    for name in ("a.jsonl", "b.jsonl.gz", "c.json.zst", "empty.jsonl", "d.jsonl"):
        found.append(tmp_path / name)
        content = b"" if name == "empty.jsonl" else b"".join(lines)
        found[-1].write_bytes(_compress(name, content.rstrip(b"\n")))
    found.append(tmp_path / "e.parquet")
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, found[-1], row_group_size=30)
    return found, [row["text"] for row in rows] * (len(found) - 1)


def _read(files, workers, place=Cursor()):
    """(texts, end) of each part."""
    return [
        ([text for batch in part.batches(["text"]) for text in batch.texts["text"]], part.end)
        for part in parts(files, workers, place)
    ]


@pytest.mark.parametrize("workers", [1, 2, 3])  # with 2, compressed files are parts as they are
def test_parts_give_every_document_once_and_go_on_from_any_place(files, workers):
    paths, expected = files
    done, read = [], _read(paths, workers)
    assert [text for found, _ in read for text in found] == expected
    assert len(read) > 60 if workers != 2 else len(read) > 40
    for found, place in read:
        done += found
        for others in (1, 2):
            rest = [text for more, _ in _read(paths, others, place) for text in more]
            assert done + rest == expected


def test_parts_end_where_their_file_does(files):
    paths, _ = files
    for part in parts(paths):
        assert 0 < part.position <= part.path.stat().st_size
    last = {part.path: part for part in parts(paths)}
    assert all(part.position == path.stat().st_size for path, part in last.items())
    assert part.end in (Cursor(len(paths)), Cursor(len(paths) - 1, part.end.offset))


def test_a_sample_comes_from_all_over_and_has_its_size(files):
    paths, expected = files
    found = sample(paths, ["text"], 4000)
    assert 2000 < sum(map(len, found)) <= 4000
    numbers = {text.partition(" ")[0] for text in found}
    assert {"0"} < numbers and all(any(whole.startswith(t) for whole in expected) for t in found)
    assert sample([paths[3]], ["text"], 4000) == []
    large = paths[0].with_name("large.jsonl")
    lines = "".join(json.dumps({"text": f"{i} " + "x" * 1000}) + "\n" for i in range(4000))
    large.write_text(lines)
    numbers = [int(text.split()[0]) for text in sample([large], ["text"], 32_000)]
    assert len(numbers) == 32 and max(numbers) > 3800
    assert max(b - a for a, b in itertools.pairwise(numbers)) < 200


def test_patterns_are_sorted_and_keep_their_order(files):
    paths, expected = files
    folder = paths[0].parent
    assert corpus_files([folder / "*.jsonl", folder / "c.*"]) == [
        paths[0],
        paths[4],
        paths[3],
        paths[2],
    ]
    assert list(texts(paths, ["text"], "stop")) == expected
    with pytest.raises(ValueError, match="is a folder, name its files: '.*/[*]"):
        corpus_files([folder])
    with pytest.raises(ValueError, match=r"none\*\.jsonl: no such file"):
        corpus_files([folder / "none*.jsonl"])


def test_parquet_rows_without_a_text_are_counted(tmp_path):
    path = tmp_path / "c.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None, "c\0", ""], "n": [1, 2, 3, 4]}), path)
    [part] = parts([path])
    [batch] = part.batches(["text"])
    assert batch.texts == {"text": ["a", "c\0", ""]} and batch.lines == batch.newlines == 4
    [(number, error)] = batch.skipped
    assert number == 2 and "its type is NoneType" in str(error)
    with pytest.raises(ValueError, match=r"c\.parquet:2: value of 'text' is not a string"):
        list(texts([path], ["text"], "stop"))
    with pytest.raises(ValueError, match=r"c\.parquet: has no column 'body', only text, n"):
        list(texts([path], ["body"], "stop"))
    with pytest.raises(ValueError, match="value of 'n' is not a string .its type is int"):
        list(texts([path], ["n"], "stop"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"c\.parquet: not a Parquet file"):
        list(parts([path]))
    path.write_bytes(whole[:4] + bytes(60) + whole[64:])
    with pytest.raises(ValueError, match=r"c\.parquet: broken Parquet file"):
        list(texts([path], ["text"], "stop"))


TYPES = {
    "string": pyarrow.string(),
    "large_string": pyarrow.large_string(),
    "string_view": pyarrow.string_view(),
    "binary": pyarrow.binary(),
    "large_binary": pyarrow.large_binary(),
    "binary_view": pyarrow.binary_view(),
    "fixed": pyarrow.binary(5),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    "dictionary of bytes": pyarrow.dictionary(pyarrow.int8(), pyarrow.binary()),
}


@pytest.mark.parametrize("name", TYPES)
def test_every_type_of_parquet_that_holds_text_is_read(tmp_path, name):
    path, words = tmp_path / "c.parquet", ["n\u00e4ch", "\0\0\0\0\0", "abcde", "n\u00e4ch"]
    parquet.write_table(pyarrow.table({"text": pyarrow.array(words).cast(TYPES[name])}), path)
    assert list(texts([path], ["text"], "stop")) == words


def test_bytes_that_are_no_text_and_nested_columns_are_named(tmp_path):
    path = tmp_path / "c.parquet"
    columns = {
        "text": pyarrow.array([b"a", b"ab\xff", None, b"b"], pyarrow.binary()),
        "list": [["a"]] * 4,
        "struct": [{"text": "a"}] * 4,
    }
    parquet.write_table(pyarrow.table(columns), path)
    [part] = parts([path])
    [batch] = part.batches(["text"])
    assert batch.texts == {"text": ["a", "b"]} and batch.bytes == 2
    assert [(number, str(error)) for number, error in batch.skipped] == [
        (2, "value of 'text' is not UTF-8 (byte 2)"),
        (3, "value of 'text' is not a string (its type is NoneType)"),
    ]
    with pytest.raises(ValueError, match=r"c\.parquet:2: value of 'text' is not UTF-8 .byte 2"):
        list(texts([path], ["text"], "stop"))
    unchecked = columns["text"].cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table(columns | {"text": unchecked}), path)
    with pytest.raises(ValueError, match=r"c\.parquet:2: value of 'text' is not UTF-8 .byte 2"):
        list(texts([path], ["text"], "stop"))
    for name, kind in (("list", "list"), ("struct", "dict")):
        with pytest.raises(ValueError, match=f"'{name}' is not a string .its type is {kind}"):
            list(texts([path], [name], "stop"))


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "c.parquet"])
@pytest.mark.parametrize("size", [20, 70, 10_000])
def test_texts_beyond_the_limit_are_counted_wherever_they_are_cut(
    tmp_path, monkeypatch, name, size
):
    monkeypatch.setattr(readers, "PART_BYTES", size)
    longest, path = 300, tmp_path / name
    lengths = [5, 288, 290, 5, 4000, 5, 289, 900]  # {"text": ""} takes 12 bytes
    rows = [{"text": "x" * n} for n in lengths]
    if name.endswith(".parquet"):
        longest = 288
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(_compress(name, b"\n".join(json.dumps(row).encode() for row in rows)))
    for start in [Cursor(), *(part.end for part in parts([path], 1, longest=longest))][:-1]:
        batches = [
            batch
            for part in parts([path], 1, start, longest=longest)
            for batch in part.batches(["text"])
        ]
        kept = [len(text) for batch in batches for text in batch.texts["text"]]
        reasons = [error.reason for batch in batches for _, error in batch.skipped]
        expected = [n for n in lengths if n <= 288]
        assert kept == expected[len(expected) - len(kept) :]
        if start == Cursor():
            assert kept == expected and reasons == ["too long"] * 4
            numbers, line = [], 0
            for batch in batches:
                numbers += [line + number for number, _ in batch.skipped]
                line += batch.newlines
            assert numbers == [3, 5, 7, 8]


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.jsonl.zst"])
def test_a_line_without_end_takes_little_memory_and_time(tmp_path, name):
    path = tmp_path / name
    with gzip.open(path, "wb", 1) if name[-1] == "z" else zstandard.open(path, "wb") as file:
        for _ in range(300):
            file.write(b"x" * 1_000_000)
    if not (child := os.fork()):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            list(texts([path], ["text"], "stop", 10_000_000))
        except ValueError as error:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            os._exit(7 if "too long" in str(error) and grown < 100_000 else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_long_parquet_rows_take_little_more_than_their_page(tmp_path):
    path = tmp_path / "c.parquet"
    rows = pyarrow.table({"text": [f"{i}" + "x" * 250_000 for i in range(800)]})  # 200 MB
    parquet.write_table(rows, path, write_batch_size=4, data_page_size=1 << 20)
    del rows
    if not (child := os.fork()):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        count = sum(1 for _ in texts([path], ["text"], "stop"))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os._exit(7 if count == 800 and grown < 100_000 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
