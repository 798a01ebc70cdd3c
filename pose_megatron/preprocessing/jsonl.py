"""JSONL: lines of JSON objects, plain or compressed, read in runs of whole lines.

corpus.jsonl(.gz|.zst) ──read_lines, read_range──► Lines ──parse_line──► texts
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import orjson

from pose_megatron.errors import ConfigError


@dataclass(frozen=True)
class Lines:
    """Whole consecutive lines of one file.

    Attributes:
        content: the lines, decompressed, newlines included.
        position: how many bytes of the file on disk have been read.
    """

    content: bytes
    position: int

    @cached_property
    def split(self) -> list[bytes]:
        """The lines, then what follows the last newline."""
        return self.content.split(b"\n")

    def texts(self, keys: Sequence[str]) -> Iterator["tuple[int, list[str] | LineError]"]:
        """For each line that is not blank: its number, and its texts or why it has none.

        Numbers count from 1 within these lines; texts are in the order of `keys`.
        """
        for number, line in enumerate(self.split, 1):
            if not line or line.isspace():
                continue
            try:
                # orjson is quick, but stricter than Python's json: parse_line has the last word
                row = orjson.loads(line)
                texts = [row[key] for key in keys]
            except (ValueError, TypeError, LookupError):
                texts = []
            if {*map(type, texts)} == {str}:
                yield number, texts
                continue
            try:
                yield number, parse_line(line, keys)
            except LineError as error:
                yield number, error


class LineError(ValueError):
    """A line that holds no document: `reason` is for counting, `detail` for a person."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self):  # pickled with both parts, to come from another process
        return LineError, (self.reason, self.detail)


def read_lines(path: Path, size: int) -> Iterator[Lines]:
    """The file in runs of whole lines of about `size` bytes each, decompressed.

    Raises:
        ConfigError: compressed data is broken or cut short.
    """
    with open(path, "rb") as file:
        if path.suffix == ".gz":
            blocks = _gzip_blocks(file, path, size)
        elif path.suffix == ".zst":
            blocks = _zstd_blocks(file, path, size)
        else:
            blocks = iter(lambda: file.read(size), b"")
        parts: list[bytes] = []
        for block in blocks:
            head, newline, tail = block.rpartition(b"\n")
            if newline:
                yield Lines(b"".join([*parts, head, newline]), file.tell())
                parts = []
            parts.append(tail)
        if content := b"".join(parts):
            yield Lines(content, file.tell())


def read_range(path: Path, start: int, end: int) -> Lines:
    """The lines of a plain file that begin within bytes [start, end).

    Adjoining ranges that cover a file give every line once, wherever they are cut.
    """
    before = min(start, 1)  # the byte that tells whether a line begins at `start`
    with open(path, "rb") as file:
        file.seek(start - before)
        content = file.read(end - start + before)
        first = content.find(b"\n") + 1 if before else 0
        if before and (not first or first == len(content)):
            return Lines(b"", end)  # the range lies within one line
        parts = [content[first:]]
        while parts[-1] and not parts[-1].endswith(b"\n"):
            parts.append(file.readline(1 << 20))
    return Lines(b"".join(parts), end)


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
        raise ConfigError(f"--input {path}: broken gzip file ({error})") from error


def _zstd_blocks(file: BinaryIO, path: Path, size: int) -> Iterator[bytes]:
    # Not zstandard's own file reader, which takes a file cut short for a whole one.
    try:
        import zstandard
    except ImportError:
        raise ConfigError(f"--input {path}: needs the package zstandard, install it") from None
    frame = None
    try:
        while data := file.read(max(size // 4, 1)):  # text shrinks about fourfold
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                if block := frame.decompress(data):
                    yield block
                data = frame.unused_data
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise ConfigError(f"--input {path}: broken zstd file ({error})") from error
    if frame:
        raise ConfigError(f"--input {path}: broken zstd file (it ends within a frame)")
