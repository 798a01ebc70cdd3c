"""Checksums of what torch.save wrote: every record of its archive has a CRC-32, which torch writes
and, when it loads, does not look at.

    archive/data.pkl      the object, and of each tensor its dtype and shape
    archive/data/0        the bytes of a storage
    (and the directory)   of each record its place, its length and its CRC-32

A file of before torch 1.6 is no archive and has none. Where a CRC-32 is 0, none was computed:
torch.serialization.set_crc32_options(False) and skip_data() leave it out.
"""

import contextlib
import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pose_megatron.errors import DamagedCheckpoint, gist

_HEADER, _END = b"PK\x03\x04", b"PK\x05\x06"
_ENTRY = 46  # bytes of a record's entry in the directory, before its name
_BLOCK = 1 << 20  # bytes read at a time
_enabled = True


@contextlib.contextmanager
def checksums(on: bool) -> Iterator[None]:
    """Whether they are checked while it lasts, in all threads."""
    global _enabled
    before, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = before


def enabled() -> bool:
    return _enabled


@dataclass
class Record:
    """A storage's bytes inside an archive; `crc` is 0 where none was computed."""

    path: Path
    offset: int
    length: int
    crc: int
    checked: bool = False

    def check(self, name: str) -> None:
        """Reads it, the first time.

        Args:
            name: of the tensor, for the message.

        Raises:
            DamagedCheckpoint: its bytes are not those that were written.
        """
        if self.checked or not self.crc or not _enabled:
            return
        found, left = 0, self.length
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            while left and (block := file.read(min(left, _BLOCK))):
                found, left = zlib.crc32(block, found), left - len(block)
        if left or found != self.crc:
            raise DamagedCheckpoint(f"{self.path} is damaged at {name}: its CRC-32 does not match")
        self.checked = True


def check(file: IO[bytes], where: str) -> None:
    """Holds every record of an archive to its CRC-32, and the directory to the file's two ends.

    Args:
        file: the archive from its first to its last byte.
        where: what it is, for the message.

    Raises:
        DamagedCheckpoint: a byte that is read when it is loaded has changed.
    """
    if not (_enabled and _is_archive(file)):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            _check_ends(file, archive)
            for info in archive.infolist():
                _check_record(archive, info)
    except Exception as error:  # damaged bytes raise errors of many classes
        raise DamagedCheckpoint(f"{where} is damaged ({gist(error)})") from None


def records(path: Path) -> dict[int, Record]:
    """The storages in a file, by the byte at which each begins; everything else is checked at once.

    Raises:
        DamagedCheckpoint: the directory or the object's description has changed.
    """
    with open(path, "rb") as file:
        if not (_enabled and _is_archive(file)):
            return {}
        found = {}
        try:
            with zipfile.ZipFile(file) as archive:
                _check_ends(file, archive)
                for info in archive.infolist():
                    if "/data/" not in info.filename:
                        _check_record(archive, info)
                        continue
                    archive.open(info).close()  # its header is the directory's
                    begin = _begin(file, info)
                    found[begin] = Record(path, begin, info.file_size, info.CRC)
        except Exception as error:  # damaged bytes raise errors of many classes
            raise DamagedCheckpoint(f"{path} is damaged ({gist(error)})") from None
    return found


def write(path: Path, crcs: Mapping[int, int]) -> None:
    """Fills in the CRC-32 of storages that were written after the archive, by where they begin."""
    with open(path, "r+b") as file, zipfile.ZipFile(file) as archive:
        entry, infos = archive.start_dir, archive.infolist()
        for info in infos:
            if (begin := _begin(file, info)) in crcs:
                stored = crcs[begin].to_bytes(4, "little")
                _overwrite(file, entry + 16, stored)
                _overwrite(file, begin + info.file_size + 4, stored)  # again, behind its bytes
            entry += _ENTRY + len(info.orig_filename.encode()) + _extra_length(file, entry)


def _check_ends(file: IO[bytes], archive: zipfile.ZipFile) -> None:
    """zipfile takes an archive with something before or behind it, too."""
    file.seek(-22, io.SEEK_END)
    end = file.read(22)
    begins = min((info.header_offset for info in archive.infolist()), default=-1)
    if begins != 0 or not (end.startswith(_END) and end.endswith(b"\0\0")):
        raise ValueError("it does not begin and end where its directory says")


def _check_record(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{info.filename} is compressed")
    unknown: Any = None
    info.CRC = info.CRC or unknown  # which zipfile does not compare
    with archive.open(info) as record:
        while record.read(_BLOCK):
            pass


def _is_archive(file: IO[bytes]) -> bool:
    file.seek(0)
    found = file.read(4) == _HEADER
    file.seek(0)
    return found


def _begin(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin, behind its header of 30 bytes, its name and a filling."""
    file.seek(info.header_offset + 26)
    lengths = file.read(4)
    return (
        info.header_offset
        + 30
        + int.from_bytes(lengths[:2], "little")
        + int.from_bytes(lengths[2:], "little")
    )


def _extra_length(file: IO[bytes], entry: int) -> int:
    file.seek(entry + 30)
    lengths = file.read(4)
    return int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _overwrite(file: IO[bytes], offset: int, content: bytes) -> None:
    file.seek(offset)
    file.write(content)
