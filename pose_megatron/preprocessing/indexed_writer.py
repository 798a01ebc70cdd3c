"""Megatron's indexed files, PREFIX.bin and PREFIX.idx, written and joined without megatron-core.

    .bin  the ids of all sequences end to end
    .idx  b"MMIDIDX\\0\\0", version (u64, 1), code of the ids' type (u8), number of sequences (u64),
          length of the document list (u64); tokens of each sequence (i32), the byte where each
          begins (i64), the document list (i64): sequences before each document, and in all

The bytes are those of megatron-core's IndexedDatasetBuilder, whose import takes seconds and which
keeps the whole index in memory. Here everything streams.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pose_megatron.errors import ConfigError
from pose_megatron.runtime.atomic_files import fsync

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
BLOCK = 1 << 20  # sequences, or bytes, in memory at a time


def token_dtype(vocab_size: int) -> type:
    """megatron-core's choice: two bytes below 65,500 ids."""
    return np.uint16 if vocab_size < 65500 else np.int32


@dataclass
class Size:
    """What a writer holds: tokens, sequences, documents."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0


class TokenWriter:
    """One pair of files in the making, under temporary names in a folder of its own.

    What was appended up to a `flush` and `sync` outlives a crash: open the same files again with
    the size of then.
    """

    def __init__(self, folder: Path, name: str, dtype: type, size: Size | None = None):
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

    def append(self, ids: Path, lengths: np.ndarray, documents: np.ndarray) -> None:
        """More documents.

        Args:
            ids: file of the ids of all sequences.
            lengths: tokens of each sequence.
            documents: sequences up to the end of each document, from the first of `lengths`.
        """
        if lengths.size and lengths.max() > np.iinfo(np.int32).max:
            raise ConfigError(
                f"{self.bin}: a document of {lengths.max():,} tokens, and the format takes at most "
                f"{np.iinfo(np.int32).max:,}; split it"
            )
        with open(ids, "rb") as source:
            copied = _copy(source, self._files[self.bin])
        tokens = int(lengths.sum(dtype=np.int64))
        assert copied == tokens * self.dtype.itemsize, (ids, copied, tokens)
        for block in _slices(lengths):
            self._files[self._lengths].write(block.astype("<i4").tobytes())
        for block in _slices(documents):
            ends = block + self.size.sequences
            self._files[self._documents].write(ends.astype("<i8").tobytes())
        self.size = Size(
            self.size.tokens + tokens,
            self.size.sequences + lengths.size,
            self.size.documents + documents.size,
        )

    def flush(self) -> None:
        for file in self._files.values():
            file.flush()

    def sync(self) -> None:
        """Puts on disk what was flushed."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Writes the .idx; both files are on disk and complete."""
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

    def close(self) -> None:
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # the disk is full, which was said where it was met
                pass


def publish(folder: Path, name: str, prefix: str) -> None:
    """Gives finished files their names; may be repeated after a crash.

    A dataset is found by its .idx: an older one goes first, and the new one comes last.
    """
    final = Path(prefix + ".bin"), Path(prefix + ".idx")
    if (folder / f"{name}.bin").exists():
        final[1].unlink(missing_ok=True)
    for path in final:
        if (temporary := folder / (name + path.suffix)).exists():
            temporary.replace(path)
    fsync(final[0].parent)


class TokenFiles:
    """A pair of files, checked: the .bin has the tokens that the .idx counts.

    Raises:
        ConfigError: they are missing, cut short or not what the names say.
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
            raise ConfigError(f"{idx}: index of an unknown version ({version}, type {code})")
        expected = HEADER.size + 12 * sequences + 8 * self._entries
        if size == expected + sequences and sequences:
            raise ConfigError(f"{idx}: a multimodal index, which this does not join")
        if size != expected:
            raise ConfigError(
                f"{idx}: has {size:,} bytes where {expected:,} are due; make the shard again"
            )
        self.dtype, self._idx = np.dtype(CODES[code]), idx
        self._lengths = _map(idx, "<i4", HEADER.size, sequences)
        self._documents = _map(idx, "<i8", HEADER.size + 12 * sequences, self._entries)
        tokens = int(sum(b.sum(dtype=np.int64) for b in _slices(self._lengths)))
        self.size = Size(tokens, sequences, self._entries - 1)
        if (found := self.bin.stat().st_size) != tokens * self.dtype.itemsize:
            raise ConfigError(
                f"{self.bin}: has {found:,} bytes, and {idx.name} counts {tokens:,} tokens of "
                f"{self.dtype.itemsize} bytes; make the shard again"
            )

    def append_to(self, writer: TokenWriter) -> None:
        writer.append(self.bin, self._lengths, self._documents[1:])


def join(prefixes: Sequence[str], folder: Path, name: str) -> Size:
    """Writes one pair of files with the documents of all, in order; `publish` names it.

    Raises:
        ConfigError: a shard is damaged, or their ids differ in type.
    """
    shards = [TokenFiles(prefix) for prefix in prefixes]
    for shard in shards[1:]:
        if shard.dtype != shards[0].dtype:
            raise ConfigError(
                f"{shard.bin}: ids are {shard.dtype}, in {shards[0].bin} {shards[0].dtype}; only "
                "shards of one tokenizer can be joined"
            )
    writer = TokenWriter(folder, name, shards[0].dtype)
    try:
        for shard in shards:
            shard.append_to(writer)
        writer.finish()
    finally:
        writer.close()
    return writer.size


def _open_at(path: Path, end: int) -> BinaryIO:
    """The file, cut back to `end` bytes and ready to grow."""
    file = open(path, "r+b" if end else "wb")
    if path.stat().st_size < end:
        raise ConfigError(f"{path}: has fewer bytes than were written; start over with --overwrite")
    file.truncate(end)
    file.seek(end)
    return file


def _copy(source: BinaryIO, target: BinaryIO) -> int:
    copied = 0
    while block := source.read(16 * BLOCK):
        target.write(block)
        copied += len(block)
    return copied


def _map(path: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    if not count:  # nothing to map
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", offset, (count,))


def _slices(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[i : i + BLOCK] for i in range(0, len(array), BLOCK))


def _blocks(path: Path, dtype: str) -> Iterator[np.ndarray]:
    return _slices(_map(path, dtype, 0, path.stat().st_size // np.dtype(dtype).itemsize))
