"""What is known of each character, shared by the processes of a run and kept from run to run.

It lies in $XDG_CACHE_HOME/pose_megatron/characters (~/.cache where that is not set), in a file of
some kilobytes for each tokenizer, named by the hash of all that it hangs on. Runs at once may write
it: each adds what it knows to what is there, and puts the file in place whole. What one of them
misses costs another look, never a wrong id.
"""

import contextlib
import hashlib
import mmap
import os
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

CODE_POINTS = 0x110000
PLAIN, NORMALIZED, UNSAFE, UNSEEN = range(4)


class KnownCharacters:
    """A verdict for each code point.

    Args:
        depends_on: all that the verdicts hang on; another of these is another file.

    Attributes:
        verdicts: by code point, uint8 (CODE_POINTS,): PLAIN, NORMALIZED, UNSAFE or UNSEEN. In
            memory that forked processes share: one byte each, and the same whoever finds it.
        file: where they are kept.
    """

    def __init__(self, depends_on: Iterable[bytes]):
        digest = hashlib.sha256()
        for part in depends_on:
            digest.update(len(part).to_bytes(8, "little") + part)
        self.file = _folder() / f"{digest.hexdigest()}.zz"
        self.verdicts = np.frombuffer(mmap.mmap(-1, CODE_POINTS), np.uint8)
        self.verdicts[:] = _read(self.file)
        self._kept = self._count()

    def keep(self) -> None:
        """Writes what is new to the file. A folder that cannot be written is left as it is: it
        costs the next run some seconds."""
        if self._count() == self._kept:
            return
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            known = np.where(self.verdicts == UNSEEN, _read(self.file), self.verdicts)
            with tempfile.NamedTemporaryFile(dir=self.file.parent, delete=False) as temporary:
                try:
                    temporary.write(zlib.compress(known.tobytes()))
                    temporary.close()
                    os.replace(temporary.name, self.file)
                except BaseException:
                    os.unlink(temporary.name)
                    raise
            self._kept = self._count()

    def _count(self) -> int:
        return int((self.verdicts != UNSEEN).sum())


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # as the XDG specification has it, a relative path is passed over
    root = Path(cache) if os.path.isabs(cache) else Path(os.path.expanduser("~/.cache"))
    return root / "pose_megatron" / "characters"


def _read(file: Path) -> np.ndarray:
    """What a file holds; nothing is known by one that is missing or damaged."""
    with contextlib.suppress(OSError, zlib.error):
        # The stream ends with a checksum; what a damaged one unpacks to is bounded.
        stream = zlib.decompressobj()
        verdicts = np.frombuffer(stream.decompress(file.read_bytes(), CODE_POINTS + 1), np.uint8)
        if stream.eof and len(verdicts) == CODE_POINTS and verdicts.max() <= UNSEEN:
            return verdicts
    return np.full(CODE_POINTS, UNSEEN, np.uint8)
