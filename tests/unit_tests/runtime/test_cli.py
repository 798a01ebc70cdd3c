"""How programs of several ranks end: one sentence, from the rank whose mistake it is."""

import os
import subprocess
import sys

import pytest

from tests.processes import PATIENCE, running

MISTAKE = """
import sys
from pose_megatron.runtime import cli

cli.ECHO_SECONDS = {seconds}

@cli.command
def main():
    print("ready", flush=True)
    raise ValueError("--seq-length 0 is too short")

sys.exit(main())
"""


def started_rank(rank: int, seconds: float):
    """A rank of two that have not met, as torchrun starts it; ended at the end if it still waits."""
    return running(
        MISTAKE.format(seconds=seconds),
        env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
        stderr=subprocess.PIPE,
    )


def test_before_the_ranks_have_met_rank_0_speaks_at_once():
    with started_rank(0, seconds=1000) as process:
        _, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, error) == (1, "-c: error: --seq-length 0 is too short\n")


def test_another_rank_says_nothing_while_torchrun_may_still_end_it():
    with started_rank(1, seconds=1000) as process:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        process.terminate()
        _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and error == ""


def test_another_rank_that_nobody_ends_speaks_for_itself():
    with started_rank(1, seconds=0) as process:
        _, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, error) == (1, "-c: error: --seq-length 0 is too short\n")


FAULT = """
import sys
import time

import torch.distributed as dist
from pose_megatron.runtime import cli

# NCCL's waits for the other ranks
dist.destroy_process_group = lambda: time.sleep(1000)

@cli.command
def main():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    {end}

sys.exit(main())
"""


@pytest.mark.parametrize(
    ("end", "last"),
    [
        ("raise RuntimeError('out of memory')", "RuntimeError: out of memory"),
        ("raise ValueError('no such file')", "-c: error: no such file"),
        ("raise KeyboardInterrupt", ""),
    ],
)
def test_a_rank_that_fails_says_why_and_leaves_without_the_others(end, last):
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    with running(FAULT.format(end=end), env=env, stderr=subprocess.PIPE) as process:
        _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == (130 if "Keyboard" in end else 1)
    assert last in error.splitlines()[-1]
    assert ("Traceback" in error) == ("RuntimeError" in end)


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_a_reader_may_leave_early(flag):
    program = [sys.executable, "-m", "pose_megatron.commands", flag]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_with_a_traceback_asked_for_every_rank_speaks_at_once(monkeypatch):
    monkeypatch.setenv("POSE_TRACEBACK", "1")
    with started_rank(1, seconds=1000) as process:
        _, error = process.communicate(timeout=PATIENCE)
    assert error.endswith("ValueError: --seq-length 0 is too short\n")
