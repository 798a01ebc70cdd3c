"""The bytes of a file, decompressed where its name says that it is compressed."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pose_megatron.errors import ConfigError

LARGEST_WINDOW = 1 << 31  # bytes that zstd looks back: those of --long=31, the most it writes
FED = 1 << 10  # bytes given to zstd at a time, of which it can make 32 MB


def compressed(path: Path) -> bool:
    return path.suffix in (".gz", ".zst")


def blocks_of(file: BinaryIO, path: Path, size: int) -> Iterator[bytes]:
    """The content of a file that is open, in blocks of about `size` bytes.

    Raises:
        ConfigError: compressed data is broken or cut short.
    """
    if path.suffix == ".gz":
        return _gzip_blocks(file, path, size)
    if path.suffix == ".zst":
        return _zstd_blocks(file, path, size)
    return iter(lambda: file.read(size), b"")


def _gzip_blocks(file: BinaryIO, path: Path, size: int) -> Iterator[bytes]:
    stream = gzip.GzipFile(fileobj=file)
    try:
        yield from iter(lambda: stream.read(size), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"--input {path}: broken gzip file ({error})") from error


def _zstd_blocks(file: BinaryIO, path: Path, size: int) -> Iterator[bytes]:
    """Holds the window of the file's frames, which zstd --long=N makes 2^N bytes, and `size`."""
    import zstandard

    # Not its stream_reader, which takes a file cut short for a whole one; and pyarrow's refuses
    # windows above 128 MiB.
    decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
    frame, content = None, bytearray()
    try:
        for fed in iter(lambda: file.read(FED), b""):
            while fed:
                frame = frame or decompressor.decompressobj()
                content += frame.decompress(fed)
                fed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
            if len(content) >= size:
                yield bytes(content)
                content.clear()
    except zstandard.ZstdError as error:
        if "too much memory" in str(error):
            raise ConfigError(
                f"--input {path}: zstd needs more than {LARGEST_WINDOW >> 30} GiB to decompress "
                "it; compress it with --long=31 or less"
            ) from error
        raise ConfigError(f"--input {path}: broken zstd file ({error})") from error
    if frame:
        raise ConfigError(f"--input {path}: broken zstd file (it is cut short)")
    if content:
        yield bytes(content)
