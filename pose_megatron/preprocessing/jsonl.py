"""JSONL: lines of JSON objects, plain or compressed, read in runs of whole lines.

corpus.jsonl(.gz|.zst) ──read_lines, read_range──► Lines ──parse_line──► texts
"""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import orjson

from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing.compression import blocks_of

LONGEST = 256_000_000  # bytes of a line or text, unless --max-document-mb says otherwise
HEAD = 1 << 16  # bytes that tell what a file is
UTF_16_OR_32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
PRETTY = re.compile(rb'\{\s*\n\s*"')  # an object over several lines, as printers write it


@dataclass(frozen=True)
class Lines:
    """Whole consecutive lines of one file.

    Attributes:
        content: the lines, decompressed, newlines included.
        position: how many bytes of the file on disk have been read.
        longest: bytes that a line may have.
        too_long: whether one more line follows that has more; only its beginning was read.
        left_out: bytes that were read and are not in `content`, of such a line.
    """

    content: bytes
    position: int
    longest: int = LONGEST
    too_long: bool = False
    left_out: int = 0

    @property
    def size(self) -> int:
        """Bytes that were read."""
        return len(self.content) + self.left_out

    @property
    def newlines(self) -> int:
        return len(self.split) - 1 + self.too_long

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
            if len(line) > self.longest:
                yield number, LineError.too_long(self.longest)
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
        if self.too_long:
            yield len(self.split), LineError.too_long(self.longest)


class LineError(ValueError):
    """A line that holds no document: `reason` is for counting, `detail` for a person."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail

    @classmethod
    def too_long(cls, longest: int) -> "LineError":
        return cls("too long", f"more than --max-document-mb {longest / 1e6:g}")

    def __reduce__(self):  # pickled with both parts, to come from another process
        return LineError, (self.reason, self.detail)


def refuse_other_forms(path: Path) -> None:
    """Refuses a file that is not JSON lines from its beginning, whose every line would be an error.

    Raises:
        ConfigError: it is one JSON array, has objects over several lines, or is not in UTF-8; or
            its compressed data is broken.
    """
    with open(path, "rb") as file:
        head = next(blocks_of(file, path, HEAD), b"")[:HEAD]
    if head.startswith(UTF_16_OR_32) or (
        b"\0" in head[:4] and head.lstrip(b"\0")[:1] in (b"{", b"[")
    ):
        raise ConfigError(
            f"--input {path}: is in UTF-16 or UTF-32; make it UTF-8, as iconv -f UTF-16 -t UTF-8 "
            "does"
        )
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    line, _, rest = head.partition(b"\n")
    if head.startswith(b"[") and not (rest.strip() and _is_json(line)):
        raise ConfigError(
            f"--input {path}: is one JSON array, where JSON lines are due, one object a line; "
            "jq -c '.[]' makes them of it"
        )
    if PRETTY.match(head):
        raise ConfigError(
            f"--input {path}: has objects over several lines, where JSON lines are due, one object "
            "a line; jq -c . makes them of it"
        )


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def read_lines(path: Path, size: int, longest: int = LONGEST) -> Iterator[Lines]:
    """The file in runs of whole lines of about `size` bytes each, decompressed.

    Of a line with more than `longest` bytes no more is held.

    Raises:
        ConfigError: compressed data is broken or cut short.
    """
    with open(path, "rb") as file:
        parts: list[bytes] = []
        held = left_out = 0  # bytes of a line's beginning, and those that were dropped
        dropping = False
        for block in blocks_of(file, path, size):
            if dropping:
                rest, newline, block = block.partition(b"\n")
                left_out += len(rest) + len(newline)
                dropping = not newline
            head, newline, tail = block.rpartition(b"\n")
            if newline:
                content = b"".join([*parts, head, newline])
                yield Lines(content, file.tell(), longest, left_out=left_out)
                parts, held, left_out = [], 0, 0
            parts.append(tail)
            held += len(tail)
            if held > longest:
                yield Lines(b"", file.tell(), longest, too_long=True, left_out=held + left_out)
                parts, held, left_out, dropping = [], 0, 0, True
        if (content := b"".join(parts)) or left_out:
            yield Lines(content, path.stat().st_size, longest, left_out=left_out)


def read_range(path: Path, start: int, end: int, longest: int = LONGEST) -> Lines:
    """The lines of a plain file that begin within bytes [start, end).

    Adjoining ranges that cover a file give every line once, wherever they are cut.
    """
    before = min(start, 1)  # the byte that tells whether a line begins at `start`
    with open(path, "rb") as file:
        file.seek(start - before)
        content = file.read(end - start + before)
        first = content.find(b"\n") + 1 if before else 0
        if before and (not first or first == len(content)):
            return Lines(b"", end, longest)  # the range lies within one line
        parts = [content[first:]]
        held = len(parts[0]) - parts[0].rfind(b"\n") - 1  # of the last line
        while parts[-1] and not parts[-1].endswith(b"\n"):
            if held > longest:
                whole, newline, line = b"".join(parts).rpartition(b"\n")
                return Lines(whole + newline, end, longest, True, len(line))
            parts.append(file.readline(1 << 20))
            held += len(parts[-1])
    return Lines(b"".join(parts), end, longest)


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
