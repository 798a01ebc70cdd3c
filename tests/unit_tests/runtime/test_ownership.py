"""ownership.py: of several processes one works on an output, and a crash frees it at once."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from pose_megatron.errors import ConfigError
from pose_megatron.runtime import ownership
from pose_megatron.runtime.ownership import owned
from tests.processes import PATIENCE, running

HOLDER = """
import sys, time
from pose_megatron.errors import ConfigError
from pose_megatron.runtime.ownership import owned

try:
    with owned(sys.argv[1], "--save x") as ownership:
        print("owns", flush=True)
        sys.stdin.readline()
        ownership.check()
except ConfigError as error:
    print(error, flush=True)
"""


def started(path: Path, code: str = HOLDER):
    """A process that owns `path` until it gets a line, or says why it does not."""
    return running(code, path, stdin=subprocess.PIPE)


@pytest.fixture
def quick(monkeypatch):
    """Heartbeats of a tenth of a second, half a second to be dead."""
    for name, seconds in (("BEAT", 0.1), ("STALE", 0.5), ("SETTLE", 0.1)):
        monkeypatch.setattr(ownership, name, seconds)


def test_a_second_process_is_told_who_is_at_work(tmp_path):
    with started(tmp_path / "out") as first:
        assert first.stdout.readline() == "owns\n"
        with started(tmp_path / "." / "out") as second:
            said = second.stdout.readline()
        assert said.startswith(f"--save x: process {first.pid} on {os.uname().nodename}, since ")
        assert f"delete {tmp_path}/.out.owner" in said and said.count("\n") == 1
        with started(tmp_path / "other") as third:
            assert third.stdout.readline() == "owns\n"
        first.communicate("\n", timeout=PATIENCE)
    assert [path.name for path in tmp_path.iterdir()] == [".other.owner"]  # it was killed


def test_of_many_at_once_one_gets_it_each_time(tmp_path):
    for _ in range(3):
        with contextlib.ExitStack() as stack:
            processes = [stack.enter_context(started(tmp_path / "out")) for _ in range(6)]
            said = [process.stdout.readline() for process in processes]
            assert sum(line == "owns\n" for line in said) == 1, said
            assert sum("is at work on it" in line for line in said) == 5, said


def test_a_kill_frees_it_at_once_whatever_was_forked(tmp_path):
    forked = HOLDER.replace(
        'print("owns"', 'import os\n        os.fork() or time.sleep(60)\n        print("owns"'
    )
    with started(tmp_path / "out", forked) as first:
        assert first.stdout.readline() == "owns\n"
        first.send_signal(signal.SIGKILL)
        first.wait()
        begin = time.monotonic()
        with owned(tmp_path / "out", "--save x"):
            assert time.monotonic() - begin < ownership.STALE
    assert not list(tmp_path.iterdir())


def test_a_forked_child_leaves_it_to_its_parent(tmp_path):
    with owned(tmp_path / "out", "--save x") as mine:
        if not (child := os.fork()):
            mine.release()
            os._exit(0)
        os.waitpid(child, 0)
        mine.check()
        with started(tmp_path / "out") as other:
            assert f"process {os.getpid()} on" in other.stdout.readline()


def test_one_process_cannot_own_it_twice(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with (
        owned(tmp_path / "out", "--save x"),
        pytest.raises(ConfigError, match="--save x: this process is at work on it already"),
    ):
        owned(link / "out", "--save x").__enter__()
    with owned(link / "out", "--save x"):
        pass


def of_another_machine(path: Path, **other) -> dict:
    record = {"host": "far", "machine": "m", "pid": 7, "job": "j", "since": "noon", "beat": 3}
    path.write_text(json.dumps(record | other))
    return record


@pytest.mark.parametrize("content", [{}, {"pid": None}, {"machine": None}])
def test_an_owner_on_another_machine_without_a_heartbeat_is_dead(quick, tmp_path, content):
    of_another_machine(tmp_path / ".out.owner", **content)
    begin = time.monotonic()
    with owned(tmp_path / "out", "--save x"):
        assert time.monotonic() - begin >= ownership.STALE
        assert json.loads((tmp_path / ".out.owner").read_text())["pid"] == os.getpid()


def test_an_owner_on_another_machine_that_beats_is_alive_by_any_clock(quick, tmp_path, monkeypatch):
    """Its file says a time of 1970, and its heartbeat is what changes."""
    monkeypatch.setattr(ownership, "STALE", 60)
    path = tmp_path / ".out.owner"
    record = of_another_machine(path)
    os.utime(path, (0, 0))

    def beat():
        time.sleep(0.5)
        with open(path, "r+b", buffering=0) as file:  # in one write, as an owner does
            file.write(json.dumps(record | {"beat": 4}).encode())
        os.utime(path, (0, 0))

    far = threading.Thread(target=beat)
    far.start()
    with pytest.raises(ConfigError, match="--save x: process 7 on far, since noon, is at work"):
        owned(tmp_path / "out", "--save x").__enter__()
    far.join()
    assert json.loads(path.read_text())["host"] == "far"


def test_a_file_whose_owner_died_before_writing_it_is_free(quick, tmp_path):
    for content in (b"", b"\0" * 512, b'{"host": "f', b"[]"):
        (tmp_path / ".out.owner").write_bytes(content)
        with owned(tmp_path / "out", "--save x"):
            pass
    assert not list(tmp_path.iterdir())


def test_who_was_taken_over_finds_out_and_removes_nothing(quick, tmp_path):
    path = tmp_path / ".out.owner"
    with owned(tmp_path / "out", "--save x") as mine:
        mine.check()
        beat = json.loads(path.read_text())["beat"]
        time.sleep(0.5)
        assert json.loads(path.read_text())["beat"] > beat
        handle = os.open(path, os.O_WRONLY)  # closed below: that would free the lock
        content = json.dumps({"host": "far", "pid": 7, "since": "noon", "job": "j"}).encode()
        os.pwrite(handle, content.ljust(512), 0)
        with pytest.raises(ConfigError, match="--save x: process 7 on far.* has taken it over"):
            mine.check()
        time.sleep(0.3)
    assert json.loads(path.read_text())["host"] == "far"
    os.close(handle)
    with owned(tmp_path / "other", "--save y") as mine:
        (tmp_path / ".other.owner").unlink()
        with pytest.raises(ConfigError, match="has taken it over.* or .*owner was deleted"):
            mine.check()


def test_locks_that_the_file_system_lacks_leave_the_heartbeat(quick, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(ownership.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(ownership.fcntl, "lockf", no_locks)
    of_another_machine(tmp_path / ".out.owner")
    with owned(tmp_path / "out", "--save x") as mine:
        mine.check()
    beating = HOLDER.replace(
        "try:", "from pose_megatron.runtime import ownership as o; o.BEAT = 0.1\n\ntry:", 1
    )
    with started(tmp_path / "out", beating) as process:
        assert process.stdout.readline() == "owns\n"
        with pytest.raises(ConfigError, match=f"process {process.pid} on .* is at work"):
            owned(tmp_path / "out", "--save x").__enter__()
        process.kill()
        with owned(tmp_path / "out", "--save x") as mine:
            mine.check()


def test_a_folder_that_cannot_be_written_is_said():
    code = HOLDER.replace("try:", "import os\nos.geteuid() or os.setuid(65534)\n\ntry:").replace(
        "except ConfigError", "except (ConfigError, OSError)"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        with started(folder / "out", code) as process:
            assert "Permission denied" in (said := process.stdout.readline()), said
            assert f"{folder}/.out.owner" in said
