"""JSONL corpora: lines of JSON objects, plain or compressed, read in runs of whole lines.

    corpus.jsonl(.gz|.zst) ──read_lines──► Lines ──parse_line──► texts
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

CORPUS_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class Lines:
    """Whole consecutive lines of one corpus file.

    Attributes:
        first: number of the first line, from 1.
        content: the lines, decompressed, newlines included.
        position: bytes of the file, as it lies on disk, read so far.
    """

    path: Path
    first: int
    content: bytes
    position: int

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """(number, line) of each line that is not blank."""
        lines = self.content.split(b"\n")
        return ((i, line) for i, line in enumerate(lines, self.first) if line.strip())

    def __len__(self) -> int:
        """Lines that are not blank."""
        return sum(1 for _ in self)


class LineError(ValueError):
    """A line that holds no document: `reason` is for counting, `detail` for the reader."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


def corpus_files(paths: Sequence[str | Path]) -> list[Path]:
    """The paths, if each is a file that read_lines knows to open.

    Raises:
        ValueError: naming the first that is not.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"--input {path}: no such file")
        if not path.name.endswith(CORPUS_SUFFIXES):
            raise ValueError(
                f"--input {path}: unknown extension, use one of {', '.join(CORPUS_SUFFIXES)}"
            )
    return list(map(Path, paths))


def read_lines(path: Path, size: int) -> Iterator[Lines]:
    """The file in runs of whole lines of about `size` bytes each, decompressed.

    Raises:
        ValueError: compressed data is broken or cut short.
    """
    with open(path, "rb") as file:
        if path.suffix == ".gz":
            blocks = _gzip_blocks(file, path, size)
        elif path.suffix == ".zst":
            blocks = _zstd_blocks(file, path, size)
        else:
            blocks = iter(lambda: file.read(size), b"")
        first, parts = 1, []
        for block in blocks:
            head, newline, tail = block.rpartition(b"\n")
            if newline:
                content = b"".join([*parts, head, newline])
                yield Lines(path, first, content, file.tell())
                first, parts = first + content.count(b"\n"), []
            parts.append(tail)
        if content := b"".join(parts):
            yield Lines(path, first, content, file.tell())


def parse_line(line: bytes, keys: Sequence[str]) -> list[str]:
    """The texts under `keys` of one JSONL line.

    Raises:
        LineError: the line is no JSON object, or a key is missing or not a string.
    """
    try:
        document = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise LineError("not UTF-8", f"byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise LineError("not JSON", f"{error.msg}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise LineError("not JSON", str(error)) from None
    if not isinstance(document, dict):
        raise LineError("not a JSON object", f"its type is {type(document).__name__}")
    for key in keys:
        if key not in document:
            raise LineError(f"lacks key {key!r}", f"it has {', '.join(document) or 'none'}"[:100])
        if not isinstance(document[key], str):
            raise LineError(
                f"value of {key!r} is not a string", f"its type is {type(document[key]).__name__}"
            )
    return [document[key] for key in keys]


def _gzip_blocks(file: BinaryIO, path: Path, size: int) -> Iterator[bytes]:
    stream = gzip.GzipFile(fileobj=file)
    try:
        yield from iter(lambda: stream.read(size), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"--input {path}: broken gzip file ({error})") from error


def _zstd_blocks(file: BinaryIO, path: Path, size: int) -> Iterator[bytes]:
    # zstandard's file reader takes a file cut short for its end; this loop does not
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"--input {path}: needs the package zstandard, install it") from None
    frame = None
    try:
        while data := file.read(size):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                if block := frame.decompress(data):
                    yield block
                data = frame.unused_data
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise ValueError(f"--input {path}: broken zstd file ({error})") from error
    if frame:
        raise ValueError(f"--input {path}: broken zstd file (it ends within a frame)")
