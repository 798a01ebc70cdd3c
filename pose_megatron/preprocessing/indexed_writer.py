"""Megatron's indexed files, PREFIX.bin and PREFIX.idx, written and joined without megatron-core.

    .bin  the ids of all sequences end to end
    .idx  b"MMIDIDX\\0\\0", version (u64, 1), code of the ids' dtype (u8), number of sequences
          (u64), length of the document list (u64); then tokens of each sequence (i32), the byte at
          which each begins (i64), and the document list (i64): how many sequences come before each
          document, and last how many there are

megatron-core's IndexedDatasetBuilder writes the same bytes, but its import takes seconds and it
keeps the whole index in memory. Here everything streams.
"""

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pose_megatron.errors import ConfigError
from pose_megatron.runtime.atomic_files import fsync
from pose_megatron.runtime.json_files import read_json

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
PARTS_OF_SAMPLES = (
    "tokens",
    "labels",
    "positions",
)  # a pair of files each: materialized.py
BLOCK = 1 << 20  # sequences, or bytes, in memory at a time


def token_dtype(vocab_size: int) -> type[np.integer]:
    """megatron-core's choice of integers for ids: two bytes for vocabularies below 65,500."""
    return np.uint16 if vocab_size < 65500 else np.int32


@dataclass
class Size:
    """How much a pair of files holds, and the CRC-32 of what was written to each."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0
    bin_crc32: int = field(default=0, compare=False)
    idx_crc32: int = field(default=0, compare=False)  # 0 before the end


class IndexedWriter:
    """Writes one pair of files, `name`.bin and `name`.idx, in a folder for unfinished work.

    What was appended before a `flush` and a `sync` outlives a crash.

    Args:
        dtype: of the ids.
        size: of a pair to go on with: what it held at its last `sync`.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype | type, size: Size | None = None):
        self.size = size or Size()
        self.dtype = np.dtype(dtype)
        self.bin, self.idx = folder / f"{name}.bin", folder / f"{name}.idx"
        self._lengths, self._documents = folder / f"{name}.lengths", folder / f"{name}.documents"
        widths = {
            self.bin: self.dtype.itemsize * self.size.tokens,
            self._lengths: 4 * self.size.sequences,
            self._documents: 8 * self.size.documents,
        }
        self._files = {path: _open_at(path, end) for path, end in widths.items()}

    def append(self, ids: Path | np.ndarray, lengths: np.ndarray, documents: np.ndarray) -> None:
        """Appends documents.

        Args:
            ids: the ids of all sequences end to end: an array, or a file that holds them.
            lengths: tokens of each sequence.
            documents: for each document, how many of these sequences come up to its end.

        Raises:
            ConfigError: a sequence is too long for the format, or the file is cut short.
        """
        if lengths.size and lengths.max() > np.iinfo(np.int32).max:
            raise ConfigError(
                f"{self.bin}: a document of {lengths.max():,} tokens, and the format takes at most "
                f"{np.iinfo(np.int32).max:,}; split it"
            )
        tokens = int(lengths.sum(dtype=np.int64))
        if isinstance(ids, Path):
            crc = _copy(
                ids, self._files[self.bin], tokens * self.dtype.itemsize, self.size.bin_crc32
            )
        else:
            assert ids.size == tokens, (ids.size, tokens)
            content = ids.astype(self.dtype).tobytes()
            self._files[self.bin].write(content)
            crc = zlib.crc32(content, self.size.bin_crc32)
        for block in _slices(lengths):
            self._files[self._lengths].write(block.astype("<i4").tobytes())
        for block in _slices(documents):
            ends = block + self.size.sequences
            self._files[self._documents].write(ends.astype("<i8").tobytes())
        self.size = Size(
            self.size.tokens + tokens,
            self.size.sequences + lengths.size,
            self.size.documents + documents.size,
            crc,
        )

    def flush(self) -> None:
        for file in self._files.values():
            file.flush()

    def sync(self) -> None:
        """Puts on disk what was flushed, so that it outlives a crash."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Writes the .idx; then both files are complete and on disk."""
        self.flush()
        self.sync()
        with open(self.idx, "wb") as idx:
            code = next(code for code, dtype in CODES.items() if dtype == self.dtype)
            idx.write(HEADER.pack(MAGIC, 1, code, self.size.sequences, self.size.documents + 1))
            for lengths in _blocks(self._lengths, "<i4"):
                idx.write(lengths.tobytes())
            start = 0
            for lengths in _blocks(self._lengths, "<i4"):
                ends = start + np.cumsum(lengths.astype(np.int64) * self.dtype.itemsize)
                idx.write(np.concatenate([[start], ends[:-1]]).astype("<i8").tobytes())
                start = int(ends[-1])
            idx.write(struct.pack("<q", 0))
            for documents in _blocks(self._documents, "<i8"):
                idx.write(documents.tobytes())
        fsync(self.idx)
        with open(self.idx, "rb") as written:
            self.size.idx_crc32 = _crc32(written)

    def close(self) -> None:
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # the disk is full, which the failed write has said
                pass


def publish(folder: Path, name: str, prefix: str) -> None:
    """Moves a finished pair to PREFIX.bin and PREFIX.idx; may be repeated after a crash.

    Datasets are found by their .idx: an older one is removed first, and the new one comes last.
    """
    final = Path(prefix + ".bin"), Path(prefix + ".idx")
    if (folder / f"{name}.bin").exists():
        final[1].unlink(missing_ok=True)
    for path in final:
        if (temporary := folder / (name + path.suffix)).exists():
            temporary.replace(path)
    fsync(final[0].parent)


class IndexedReader:
    """Reads one pair of files; the .idx is checked at once.

    Raises:
        ConfigError: a file is missing, cut short or of another format.
    """

    def __init__(self, prefix: str):
        self.bin, idx = Path(prefix + ".bin"), Path(prefix + ".idx")
        for path in (self.bin, idx):
            if not path.is_file():
                raise ConfigError(f"{path}: no such file")
        size = idx.stat().st_size
        with open(idx, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise ConfigError(f"{idx}: not an index of megatron-core")
        _, version, code, sequences, self._entries = HEADER.unpack(header)
        if version != 1 or code not in CODES:
            raise ConfigError(f"{idx}: index of an unknown version ({version}, dtype code {code})")
        if not np.issubdtype(CODES[code], np.integer):
            raise ConfigError(f"{idx}: its values are {np.dtype(CODES[code])}, not token ids")
        expected = HEADER.size + 12 * sequences + 8 * self._entries
        if size == expected + sequences and sequences:
            raise ConfigError(f"{idx}: a multimodal index, which cannot be joined")
        if size != expected:
            raise ConfigError(f"{idx}: has {size:,} bytes where {expected:,} are due")
        self.dtype = np.dtype(CODES[code])
        self._lengths = _map(idx, "<i4", HEADER.size, sequences)
        self._documents = _map(idx, "<i8", HEADER.size + 12 * sequences, self._entries)
        _check(
            idx,
            self._lengths,
            _map(idx, "<i8", HEADER.size + 4 * sequences, sequences),
            self._documents,
            self.dtype.itemsize,
        )
        tokens = int(sum(b.sum(dtype=np.int64) for b in _slices(self._lengths)))
        self.size = Size(tokens, sequences, self._entries - 1)

    def check_tokens(self) -> None:
        """The .bin must have the tokens that the .idx counts."""
        due = self.size.tokens * self.dtype.itemsize
        if (found := self.bin.stat().st_size) != due:
            raise ConfigError(
                f"{self.bin} has {found} bytes, its index describes {due}: truncated or from "
                "another corpus; make it again"
            )

    def append_to(self, writer: IndexedWriter) -> None:
        writer.append(self.bin, self._lengths, self._documents[1:])


def _check(
    idx: Path, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray, width: int
) -> None:
    """Sequences must lie end to end and documents follow each other; read in pieces, since an index
    may be larger than memory."""
    end = 0
    for begin, part in zip(range(0, len(lengths), BLOCK), _slices(lengths), strict=True):
        if (part < 0).any():
            raise ConfigError(f"{idx}: a document has a negative length")
        ends = end + np.cumsum(part.astype(np.int64) * width)
        begins = np.concatenate([[end], ends[:-1]])
        if (pointers[begin : begin + len(part)] != begins).any():
            raise ConfigError(f"{idx}: its documents do not adjoin")
        end = int(ends[-1])
    if not len(documents) or documents[0] != 0 or documents[-1] != len(lengths):
        raise ConfigError(f"{idx}: its tables disagree")
    before = 0
    for ends in _slices(documents):
        if ends[0] < before or (np.diff(ends) < 0).any():
            raise ConfigError(f"{idx}: its documents are not in order")
        before = int(ends[-1])


def join(prefixes: Sequence[str], folder: Path, name: str) -> Size:
    """Writes one pair of files with the documents of all shards, in order.

    Raises:
        ConfigError: a shard is damaged, or their ids differ in dtype.
    """
    shards = [IndexedReader(prefix) for prefix in prefixes]
    for shard in shards:
        shard.check_tokens()
    for prefix in prefixes:
        check_digests(prefix)
    for shard in shards[1:]:
        if shard.dtype != shards[0].dtype:
            raise ConfigError(
                f"{shard.bin}: ids are {shard.dtype}, in {shards[0].bin} {shards[0].dtype}; only "
                "shards of one tokenizer can be joined"
            )
    writer = IndexedWriter(folder, name, shards[0].dtype)
    try:
        for shard in shards:
            shard.append_to(writer)
        writer.finish()
    finally:
        writer.close()
    return writer.size


def _open_at(path: Path, end: int) -> BinaryIO:
    """The file, cut to its first `end` bytes and open for more."""
    file = open(path, "r+b" if end else "wb")
    if path.stat().st_size < end:
        raise ConfigError(
            f"{path}: has fewer than the {end:,} bytes that were written; start over with "
            "--overwrite"
        )
    file.truncate(end)
    file.seek(end)
    return file


def _copy(path: Path, target: BinaryIO, expected: int, crc: int) -> int:
    """Appends a file of `expected` bytes; returns the CRC-32 that `crc` becomes with them."""
    copied = 0
    with open(path, "rb") as source:
        while block := source.read(16 * BLOCK):
            target.write(block)
            crc = zlib.crc32(block, crc)
            copied += len(block)
    if copied != expected:
        raise ConfigError(
            f"{path}: has {copied:,} bytes where {expected:,} are due; it changed while it was read"
        )
    return crc


def _crc32(file: BinaryIO) -> int:
    crc = 0
    while block := file.read(16 * BLOCK):
        crc = zlib.crc32(block, crc)
    return crc


def digests(prefix: str, size: Size) -> dict[str, str]:
    """CRC-32 of each file of a pair, by its name, for the summary that is written beside it."""
    name = Path(prefix).name
    return {f"{name}.bin": f"{size.bin_crc32:08x}", f"{name}.idx": f"{size.idx_crc32:08x}"}


def check_digests(prefix: str) -> bool:
    """Compares a pair with the digests in a summary beside it; False where there are none, as
    beside Megatron's own files.

    Raises:
        ConfigError: a file is not what was written; or the summary is damaged.
    """
    if not (found := summary_of(prefix)):
        return False
    summary, content = found
    for suffix in (".bin", ".idx"):
        file = Path(prefix + suffix)
        with open(file, "rb") as opened:
            crc = f"{_crc32(opened):08x}"
        if crc != content["crc32"].get(file.name):
            raise ConfigError(
                f"{file} is damaged: its CRC-32 is {crc}, in {summary.name} "
                f"{content['crc32'].get(file.name)}; make it again, or delete the latter"
            )
    return True


def summary_of(prefix: str) -> tuple[Path, dict] | None:
    """The summary that was written beside a pair, and what it says; None where there is none.

    Raises:
        ConfigError: it is damaged.
    """
    for path in _summaries(Path(prefix)):
        content = read_json(path) if path.is_file() else {}
        known = content.get("crc32", {})
        if not isinstance(known, dict):
            raise ConfigError(f"{path} is damaged: crc32 is {known!r}; make it again"[:300])
        if f"{Path(prefix).name}.bin" in known:
            return path, content
    return None


def _summaries(prefix: Path) -> list[Path]:
    """Where preprocess, merge and materialize write of a pair what they know. Another JSON file may
    be the corpus itself."""
    words = prefix.name.split("_")
    stems = ["_".join(words[:n]) for n in range(len(words), 0, -1)]
    found = [prefix.with_name(f"{stem}_summary.json") for stem in stems]
    if len(words) > 1 and words[-1] in PARTS_OF_SAMPLES:
        found.append(prefix.with_name(f"{stems[1]}.json"))
    return found


def _map(path: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    if not count:  # nothing to map
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", offset, (count,))


def _slices(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[i : i + BLOCK] for i in range(0, len(array), BLOCK))


def _blocks(path: Path, dtype: str) -> Iterator[np.ndarray]:
    return _slices(_map(path, dtype, 0, path.stat().st_size // np.dtype(dtype).itemsize))
