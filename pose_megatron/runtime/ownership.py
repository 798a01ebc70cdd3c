"""One job at a time for an output, on one machine or on several that share a file system.

    with owned("data/corpus", "--output-prefix data/corpus") as ownership:
        ...                     # data/.corpus.owner exists, locked, and changes every few seconds
        ownership.check()       # before what must not happen twice
        ...

The owner file says who works on the output. A lock on it (POSIX, which NFS, Lustre and GPFS carry
between machines) tells at once whether the owner lives: the kernel frees it with the process, and
no process that was forked inherits it. Where locks stay within a machine, the owner's heartbeat, a
number in the file, tells the other machines: one that changes while they watch is alive, one that
stands still for `STALE` seconds is dead. So no two clocks are ever compared.

Whoever owns an output may take everything that others have begun beside it for dead.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pose_megatron.errors import ConfigError

BEAT = 5.0  # seconds from one heartbeat to the next
STALE = 30.0  # seconds without one, after which an owner on another machine counts as dead
SETTLE = 1.0  # seconds in which one of several that take over sees that another one did
SIZE = 512  # bytes of an owner file, written at once
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
BUSY = {errno.EAGAIN, errno.EACCES}  # what another's lock gives

_here: set[Path] = set()  # what this process owns: its own lock would not stop it


class Ownership:
    """What `owned` yields.

    Args:
        path: the owner file, taken already.
        handle: it, open and locked: closing any handle of the file frees the lock.
        what: for messages.
    """

    def __init__(self, path: Path, handle: int, record: dict, what: str):
        self._path, self._handle, self._record, self._what = path, handle, record, what
        self._process, self._end = os.getpid(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name=path.name)
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether another job took the output over while this one stood still."""
        return not _is_at(self._handle, self._path) or not self._is_in_file()

    def check(self) -> None:
        """Raises ConfigError where `is_lost`."""
        if self.is_lost:
            found = _read(self._handle) if _is_at(self._handle, self._path) else {}
            raise ConfigError(
                f"{self._what}: {_name(found)} has taken it over, while this job stood still for "
                f"{STALE:.0f} s or {self._path} was deleted"
            )

    def release(self) -> None:
        """Removes the owner file; in a forked child nothing."""
        if os.getpid() != self._process:
            return
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if not self.is_lost:
                self._path.unlink()  # before the lock goes: nobody can have taken it
        os.close(self._handle)

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            with contextlib.suppress(OSError):  # a full disk, a server that is away
                if self._is_in_file():
                    self._record["beat"] += 1
                    _write(self._handle, self._record)

    def _is_in_file(self) -> bool:
        return _read(self._handle).get("job") == self._record["job"]


@contextlib.contextmanager
def owned(path: str | Path, what: str) -> Iterator[Ownership]:
    """Makes this process the only one that works on an output until the block ends.

    Args:
        path: the output: a file, a folder or a prefix of files; need not exist. The owner file is
            .NAME.owner beside it, in a folder that is made if it is missing.
        what: how messages begin: the flag and its value.

    Raises:
        ConfigError: another job is at work on it.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    folder = path.parent.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".{path.name}.owner"
    if file in _here:
        raise ConfigError(f"{what}: this process is at work on it already")
    _here.add(file)
    try:
        ownership = _take(file, what)
        try:
            yield ownership
        finally:
            ownership.release()
    finally:
        _here.discard(file)


def _take(file: Path, what: str) -> Ownership:
    record = {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "job": uuid.uuid4().hex,
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "beat": 0,
    }
    while True:
        handle, new = _open(file)
        try:
            locked = _lock(handle, file, what)
            # An owner on this machine would have the lock; one on another may be out of its reach.
            near = new or (locked and _read(handle).get("machine") == record["machine"])
            # Its owner may have removed the file since it was opened.
            if _is_at(handle, file) and (near or _is_dead(handle, file, what)):
                _write(handle, record)
                if near or _stays(handle, record, file, what):
                    return Ownership(file, handle, record, what)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _open(file: Path) -> tuple[int, bool]:
    """The owner file, and whether this process made it."""
    while True:
        for flags in (0, os.O_CREAT | os.O_EXCL):
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                return os.open(file, os.O_RDWR | flags, 0o666), bool(flags)


def _lock(handle: int, file: Path, what: str) -> bool:
    """Locks the file; False where the file system cannot. Another's lock is a refusal."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in BUSY:
            raise _refusal(_read(handle), file, what) from None
        if error.errno not in NO_LOCKS:
            raise
        return False


def _is_dead(handle: int, file: Path, what: str) -> bool:
    """Whether an owner's heartbeat stands still; False where the owner has just ended."""
    owner = _read(handle)  # {} while it is written for the first time
    if owner:
        print(f"{what}: {_name(owner)} was at work on it; is it alive?", file=sys.stderr)
    end = time.monotonic() + (STALE if owner else SETTLE)
    while time.monotonic() < end:
        time.sleep(SETTLE / 10)
        if not _is_at(handle, file):
            return False
        if (found := _read(handle)) != owner:
            raise _refusal(found, file, what)
    return True


def _stays(handle: int, record: dict, file: Path, what: str) -> bool:
    """Whether nobody else has taken the file over at the same time, where locks do not reach."""
    time.sleep(SETTLE)
    if (found := _read(handle)).get("job") != record["job"]:
        raise _refusal(found, file, what)
    return _is_at(handle, file)


def _refusal(owner: dict, file: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{what}: {_name(owner)} is at work on it; wait until that ends, or end it (where there is "
        f"no such process, delete {file})"
    )


def _name(owner: dict) -> str:
    if "pid" not in owner:
        return "another process"
    return f"process {owner['pid']} on {owner.get('host')}, since {owner.get('since')},"


def _machine() -> str:
    """What locks reach in any case: one running kernel, with all its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return socket.gethostname()


def _is_at(handle: int, path: Path) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _read(handle: int) -> dict[str, Any]:
    """What the owner file says; {} where its owner has not written it."""
    try:
        found = json.loads(os.pread(handle, SIZE, 0))
        return found if isinstance(found, dict) else {}
    except ValueError:
        return {}


def _write(handle: int, record: dict) -> None:
    os.pwrite(handle, json.dumps(record).encode().ljust(SIZE), 0)
    os.fsync(handle)  # for NFS: now other machines see it
