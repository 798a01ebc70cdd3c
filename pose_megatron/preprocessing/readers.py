"""A corpus: JSONL (plain, gzip, zstd) and Parquet files, cut into parts that workers read.

    patterns ──corpus_files──► files ──parts──► Part ──batches──► TextBatch: texts by key

Parts come in the order of the documents. Plain files are cut into ranges of bytes, Parquet files
into row groups. Compressed files can only be read from their start: with as many of them as
workers, each file is one part; with fewer, they are decompressed here and cut into runs of lines.
"""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing.compression import compressed
from pose_megatron.preprocessing.jsonl import (
    LONGEST,
    LineError,
    Lines,
    read_lines,
    read_range,
    refuse_other_forms,
)
from pose_megatron.preprocessing.tokenizer import replace_surrogates
from pose_megatron.runtime.lfs_pointers import refuse_lfs_pointer

SUFFIXES = (
    *(f".{kind}{packed}" for kind in ("jsonl", "json") for packed in ("", ".gz", ".zst")),
    ".parquet",
)
PART_BYTES = 1 << 20  # of text: a few milliseconds of gigatoken, 200 of a Hugging Face tokenizer
PARQUET_ROWS = 64  # decoded at a time: rows may be long
SKIPPING = "mend the line, or skip such lines with --on-error skip"
SPOTS = 32  # places of the corpus that a sample is taken from


@dataclass
class TextBatch:
    """The texts of some consecutive lines or rows.

    Attributes:
        texts: by key, one per document.
        numbers: of each document's line, counted from 1 within the batch.
        lines: how many lines are not blank.
        newlines: how many lines there are, blank ones included.
        bytes: their size, decompressed.
        skipped: (number, error) of each line without a document; numbers count from 1 within the
            batch.
        replaced: how many texts had lone surrogates, which became U+FFFD.
    """

    texts: dict[str, list[str]]
    lines: int = 0
    newlines: int = 0
    bytes: int = 0
    skipped: list[tuple[int, LineError]] = field(default_factory=list)
    replaced: int = 0
    numbers: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Cursor:
    """Where in the corpus to continue, for instance after an interruption.

    Attributes:
        file: index of the file in the corpus.
        offset: where in that file, in decompressed bytes or in row groups.
    """

    file: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Part:
    """Consecutive documents of one file.

    Attributes:
        file: index of the file in the corpus.
        end: where the next part begins.
        position: how many bytes of the file on disk end with this part.
        span: bytes of a plain file, or row groups of a Parquet file, [start, end); None for the
            whole file.
        lines: the part's content, where it had to be read to be cut.
        longest: bytes that a line, or a text in a Parquet file, may have.
    """

    path: Path
    file: int
    end: Cursor
    position: int
    span: tuple[int, int] | None = None
    lines: Lines | None = None
    longest: int = LONGEST

    def batches(self, keys: Sequence[str]) -> Iterator[TextBatch]:
        """The part's documents, some at a time.

        Raises:
            ConfigError: the file is damaged, or has no such column.
        """
        if self.path.suffix == ".parquet":
            yield from _parquet_batches(self.path, self.span, keys, self.longest)
        elif self.lines:
            yield _batch(self.lines, keys)
        elif self.span:
            yield _batch(read_range(self.path, *self.span, self.longest), keys)
        else:
            for lines in read_lines(self.path, PART_BYTES, self.longest):
                yield _batch(lines, keys)


def corpus_files(patterns: Sequence[str | Path]) -> list[Path]:
    """The files that the patterns match, in the patterns' order, sorted within a pattern.

    Raises:
        ConfigError: a pattern matches nothing or a folder, or a file is of an unknown kind, or of
            another form than JSON lines.
    """
    files: list[Path] = []
    for pattern in map(str, patterns):
        if Path(pattern).is_dir():
            raise ConfigError(
                f"--input {pattern}: is a folder, name its files: '{pattern}/*.jsonl'"
            )
        found = (
            [Path(pattern)]
            if Path(pattern).is_file()
            else sorted(
                path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file()
            )
        )
        if not found:
            raise ConfigError(f"--input {pattern}: no such file")
        for path in found:
            if not path.name.endswith(SUFFIXES):
                raise ConfigError(
                    f"--input {path}: unknown extension, use one of {', '.join(SUFFIXES)}"
                )
            refuse_lfs_pointer(path, ConfigError)
            if path.suffix != ".parquet":
                refuse_other_forms(path)
        files += found
    return files


def parts(
    files: Sequence[Path], workers: int = 1, start: Cursor = Cursor(), longest: int = LONGEST
) -> Iterator[Part]:
    """The parts of the corpus from `start` on, cut for `workers` processes."""
    whole = sum(compressed(path) for path in files) >= workers > 1
    for index, path in enumerate(files[start.file :], start.file):
        offset, next_file = start.offset if index == start.file else 0, Cursor(index + 1)
        size = path.stat().st_size
        if path.suffix == ".parquet":
            groups = _parquet(path).metadata.num_row_groups
            for group in range(offset, groups):
                end = Cursor(index, group + 1) if group + 1 < groups else next_file
                yield Part(
                    path,
                    index,
                    end,
                    size * (group + 1) // groups,
                    (group, group + 1),
                    longest=longest,
                )
        elif not compressed(path):
            for begin in range(offset, size, PART_BYTES):
                stop = min(begin + PART_BYTES, size)
                end = Cursor(index, stop) if stop < size else next_file
                yield Part(path, index, end, stop, (begin, stop), longest=longest)
        elif whole and not offset:
            yield Part(path, index, next_file, size, longest=longest)
        else:
            done = 0
            for lines in read_lines(path, PART_BYTES, longest):
                done += lines.size
                if done > offset:
                    yield Part(path, index, Cursor(index, done), lines.position, lines=lines)


def texts(
    files: Sequence[Path], keys: Sequence[str], on_error: str, longest: int = LONGEST
) -> Iterator[str]:
    """All texts, one after the other.

    Raises:
        ConfigError: `on_error` is "stop" and a line holds no document.
    """
    for path in files:
        before = 0
        for part in parts([path], longest=longest):
            for batch in part.batches(keys):
                if batch.skipped and on_error == "stop":
                    raise line_error(path, before, *batch.skipped[0])
                before += batch.newlines
                for row in zip(*batch.texts.values(), strict=True):
                    yield from row


def sample(
    files: Sequence[Path], keys: Sequence[str], size: int, longest: int = LONGEST
) -> list[str]:
    """About `size` characters of text from all over the corpus; long texts are cut."""
    if len(files) > SPOTS:
        files = [files[i * len(files) // SPOTS] for i in range(SPOTS)]
    spots = [part for path in files for part in _spread(path, SPOTS // len(files))]
    kept: list[str] = []
    for part in spots:
        part = replace(part, longest=longest)
        left = size // len(spots)
        batches = (batch.texts.values() for batch in part.batches(keys))
        for text in chain.from_iterable(chain.from_iterable(batches)):
            kept.append(text[:left])
            left -= len(kept[-1])
            if left <= 0:
                break
    return kept


def line_error(
    path: Path, before: int, number: int, error: LineError, way_out: str = SKIPPING
) -> ConfigError:
    """The error that stops at line `number`, counted after the `before` first lines of the file."""
    return ConfigError(f"{path}:{before + number}: {error}; {way_out}")


def _spread(path: Path, count: int) -> list[Part]:
    """A few parts from all over one file, or the beginning of a compressed one."""
    if compressed(path):
        return [Part(path, 0, Cursor(), 0)]
    if path.suffix == ".parquet":
        groups = _parquet(path).metadata.num_row_groups
        return [
            Part(path, 0, Cursor(), 0, (i, i + 1))
            for i in sorted({n * groups // count for n in range(count)})
            if groups
        ]
    size = path.stat().st_size
    step = max(size // count, 1)
    return [
        Part(path, 0, Cursor(), 0, (begin, min(begin + (1 << 16), size)))
        for begin in range(0, size, max(step, 1 << 16))
    ]


def _batch(lines: Lines, keys: Sequence[str]) -> TextBatch:
    batch = TextBatch({key: [] for key in keys}, bytes=lines.size, newlines=lines.newlines)
    for number, row in lines.texts(keys):
        batch.lines += 1
        if isinstance(row, LineError):
            batch.skipped.append((number, row))
            continue
        batch.numbers.append(number)
        for key, text in zip(keys, row, strict=True):
            clean = replace_surrogates(text)
            batch.replaced += clean is not text
            batch.texts[key].append(clean)
    return batch


def _parquet(path: Path):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ConfigError(f"--input {path}: needs the package pyarrow, install it") from None
    try:
        return parquet.ParquetFile(path, buffer_size=PART_BYTES, pre_buffer=False)
    except (ArrowException, OSError) as error:
        raise ConfigError(f"--input {path}: not a Parquet file ({error})") from error


def _parquet_batches(
    path: Path, groups: tuple[int, int] | None, keys: Sequence[str], longest: int
) -> Iterator[TextBatch]:
    """Batches of about PART_BYTES; pyarrow decodes some rows at a time, and at least a page."""
    from pyarrow import ArrowException

    file = _parquet(path)
    first, end = groups or (0, file.metadata.num_row_groups)
    for key in keys:
        if key not in file.schema_arrow.names:
            raise ConfigError(
                f"--input {path}: has no column {key!r}, only {', '.join(file.schema_arrow.names)}"
            )
    batch = _empty(keys)
    try:
        for group in range(first, end):
            rows = _rows_at_once(file.metadata.row_group(group))
            for table in file.iter_batches(rows, [group], list(keys)):
                columns = [table.column(key) for key in keys]
                for i in range(table.num_rows):
                    _add_row(batch, [column[i] for column in columns], longest)
                    if batch.bytes >= PART_BYTES:
                        yield batch
                        batch = _empty(keys)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--input {path}: broken Parquet file ({error})") from error
    if batch.lines:
        yield batch


def _rows_at_once(group) -> int:
    """As many rows of a row group as have PART_BYTES on average, PARQUET_ROWS at most."""
    average = group.total_byte_size // max(group.num_rows, 1)
    return max(min(PART_BYTES // max(average, 1), PARQUET_ROWS), 1)


def _empty(keys: Sequence[str]) -> TextBatch:
    return TextBatch({key: [] for key in keys})


def _add_row(batch: TextBatch, row: Sequence, longest: int) -> None:
    batch.lines += 1
    batch.newlines += 1
    texts = [_text_of(scalar, key) for key, scalar in zip(batch.texts, row, strict=True)]
    sizes = [len(text.encode()) for text in texts if isinstance(text, str)]
    batch.bytes += sum(sizes)
    errors = [text for text in texts if isinstance(text, LineError)]
    if not errors and max(sizes) > longest:
        errors = [LineError.too_long(longest)]
    if errors:
        batch.skipped.append((batch.lines, errors[0]))
        return
    batch.numbers.append(batch.lines)
    for key, text in zip(batch.texts, texts, strict=True):
        assert isinstance(text, str)
        batch.texts[key].append(text)


def _text_of(scalar, key: str) -> str | LineError:
    """A string, also one that is kept as bytes; or why it is none."""
    try:
        value = scalar.as_py()
        text = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:  # of bytes, or of strings that nobody checked
        return LineError(f"value of {key!r} is not UTF-8", f"byte {error.start}")
    if isinstance(text, str):
        return text
    return LineError(f"value of {key!r} is not a string", f"its type is {type(text).__name__}")
