"""A command line of ours in a process of its own, bounded in memory and time, and how it ended."""

import contextlib
import os
import resource
import select
import signal
import struct
import sys
import time
import traceback
from dataclasses import dataclass

import psutil

from pose_megatron.runtime.startup import prepare_megatron

prepare_megatron()

from pose_megatron.commands.__main__ import main as command
from pose_megatron.pretrain import main as pretrain
from pose_megatron.training import train, trainer  # noqa: F401  what the trainer imports last

SECONDS = 120  # beyond them it hangs
MEBIBYTES = 1024  # resident, beyond what it begins with: the stated memory
_BEGAN = struct.Struct("<q")
_HARD = 4 * MEBIBYTES << 20  # address space: an allocation beyond it fails


@dataclass(frozen=True)
class Ended:
    """How an attempt ended.

    Attributes:
        how: "accepted", "refused" (exit code and a sentence), "traceback", "killed", "hung", or
            "memory".
        said: what it printed.
        mebibytes: the most that it had resident beyond what it began with.
    """

    how: str
    said: str
    mebibytes: float

    @property
    def last_line(self) -> str:
        lines = [line for line in self.said.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def attempt(words: list[str]) -> Ended:
    """Runs `pose-megatron WORDS`, or the trainer where the first word is "pretrain", to its end."""
    return Attempt(words).end()


class Attempt:
    """A program that runs.

    The process is a fork of this one, which has imported everything: seconds of each attempt would
    be imports.
    """

    def __init__(self, words: list[str]):
        self._receiver, sender = os.pipe()
        self._child = os.fork()
        if not self._child:
            os.close(self._receiver)
            _run(words, sender)
        os.close(sender)

    def kill(self) -> None:
        """Ends the process, not those that it has started."""
        os.kill(self._child, signal.SIGKILL)

    def end(self) -> Ended:
        began, said, hung = _read_all(self._receiver, self._child)
        _, status, usage = os.wait4(self._child, 0)
        code = os.waitstatus_to_exitcode(status)
        mebibytes = max(usage.ru_maxrss * 1024 - began, 0) / (1 << 20)
        if hung:
            how = "hung"
        elif "MemoryError" in said or "Cannot allocate memory" in said or mebibytes > MEBIBYTES:
            how = "memory"
        elif "Traceback (most recent call last)" in said:
            how = "traceback"
        elif code < 0:
            how = "killed"
        else:
            how = "refused" if code else "accepted"
        return Ended(how, said, mebibytes)


def _run(words: list[str], sender: int) -> None:
    """In the child; never returns."""
    code = 99
    try:
        os.setsid()  # so that its own children end with it
        # Not what its parent has: a fork begins without the pages of the libraries' files.
        os.write(sender, _BEGAN.pack(psutil.Process().memory_info().rss))
        os.dup2(sender, 1)
        os.dup2(sender, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, closefd=False) for number, mode in ((0, "r"), (1, "w"), (2, "w"))
        )
        size = psutil.Process().memory_info().vms + _HARD
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        if words[0] == "pretrain":
            sys.argv = ["pretrain_pose.py", *words[1:]]
            code = pretrain() or 0
        else:
            sys.argv = ["pose-megatron", *words]
            code = command() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _read_all(receiver: int, child: int) -> tuple[int, str, bool]:
    """Bytes that the child has resident when it begins, what it prints until it ends, and whether
    it had to be ended."""
    said, hung = b"", False
    end = time.monotonic() + SECONDS
    while True:
        left = end - time.monotonic()
        ready, _, _ = select.select([receiver], [], [], max(left, 0))
        if not ready:
            hung = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            break
        if not (block := os.read(receiver, 1 << 16)):
            break
        said += block
    os.close(receiver)
    (began,) = _BEGAN.unpack(said[: _BEGAN.size].ljust(_BEGAN.size, b"\0"))  # killed before it
    return began, said[_BEGAN.size :].decode(errors="replace"), hung
