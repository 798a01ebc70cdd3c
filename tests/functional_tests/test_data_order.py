"""The same samples, hence the same losses, however they come: drawn or read from disk, on more
ranks, through a cache that two jobs fill at once, in a run that goes on for longer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import PATIENCE

# A blend, packed, with a sampler that reads tokens, a plain share and a target that grows.
FLAGS = """
    --seq-length 32 --max-position-embeddings 512 --rope-scaling linear --num-layers 2
    --hidden-size 32 --num-attention-heads 2 --vocab-size 257 --micro-batch-size 2
    --global-batch-size 4 --lr 1e-2 --lr-decay-style constant --log-interval 1
    --data-mode packed --position-sampler pose-boundary --pose-boundaries 10 32
    --pose-num-chunks 4 --pose-plain-fraction 0.25 --pose-target-schedule 0:128 8:512""".split()


def start(root: Path, program: str, *words: str, ranks: int = 1) -> subprocess.Popen:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    return subprocess.Popen(
        [*command, str(root / program), *words],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env | {"OMP_NUM_THREADS": "1"},
    )


def said(job: subprocess.Popen) -> str:
    out, errors = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, out[-2000:] + errors[-4000:]
    return out


@pytest.fixture(scope="module")
def logs(root, stdlib_corpus, tmp_path_factory):
    """({name: steps}, {name: what was printed}, prefix of the materialised samples)"""
    folder = tmp_path_factory.mktemp("order")
    prefix, cache = str(folder / "samples" / "pose"), str(folder / "cache")
    blend = ["--data-path", "0.7", stdlib_corpus, "0.3", stdlib_corpus]
    five, alone = ["--train-iters", "5"], ["--num-workers", "0"]

    def train(name, *words, ranks=1):
        return start(
            root,
            "pretrain_pose.py",
            *FLAGS,
            "--log-file",
            str(folder / f"{name}.jsonl"),
            *words,
            ranks=ranks,
        )

    tool = start(
        root,
        "tools/materialize_positions.py",
        "--output",
        prefix,
        *FLAGS,
        *blend,
        *five,
        "--split",
        "1,0,0",
    )
    drawn = train("drawn", *blend, *five, *alone, "--split", "1,0,0")
    printed = {"tool": said(tool), "drawn": said(drawn)}
    # Two jobs that meet an empty cache together.
    jobs = {
        "ranks": train(
            "ranks",
            *blend,
            *five,
            "--split",
            "1,0,0",
            "--data-cache-path",
            cache,
            "--micro-batch-size",
            "1",
            "--num-workers",
            "1",
            ranks=2,
        ),
        "longer": train(
            "longer",
            *blend,
            *alone,
            "--train-iters",
            "8",
            "--split",
            "1,0,0",
            "--data-cache-path",
            cache,
            "--micro-batch-size",
            "2",
        ),
    }
    printed |= {name: said(job) for name, job in jobs.items()}
    printed["read"] = said(
        train(
            "read",
            *five,
            *alone,
            "--materialized",
            prefix,
            "--test-data-path",
            stdlib_corpus,
            "--eval-iters",
            "2",
        )
    )
    steps = {
        name: list(map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines()))
        for name in ("drawn", "read", "ranks", "longer")
    }
    assert not list(Path(cache).glob("*.tmp")) and len(list(Path(cache).iterdir())) >= 3
    return steps, printed, prefix


def test_more_ranks_and_a_cache_change_rounding_at_most(logs):
    drawn, ranks = logs[0]["drawn"], logs[0]["ranks"]
    assert len(ranks) == 5
    for one, other in zip(drawn, ranks, strict=True):
        for name in ("loss", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-5)


def test_a_longer_run_begins_with_the_shorter_one(logs):
    drawn, longer = logs[0]["drawn"], logs[0]["longer"]
    assert len(longer) == 8
    for one, other in zip(drawn, longer[:5], strict=True):
        for name in ("loss", "grad_norm", "lr"):
            assert other[name] == one[name]


def test_the_losses_are_the_same_bits(logs):
    steps, printed, prefix = logs
    drawn, read = steps["drawn"], [step for step in steps["read"] if "loss" in step]
    assert len(drawn) == len(read) == 5
    for one, other in zip(drawn, read, strict=True):
        for name in ("loss", "grad_norm", "lr", "consumed_samples"):
            assert one[name] == other[name]
    assert len({step["loss"] for step in drawn}) == 5
    assert f"positions  of {prefix}: pose-boundary, window L = 32" in printed["read"]
    assert "20 samples of 32 tokens" in printed["tool"]


def test_a_test_set_of_its_own_is_read_after_the_last_step(logs):
    steps, printed, _ = logs
    (last,) = [step for step in steps["read"] if "test_loss" in step]
    assert last["iteration"] == 5 and 3 < last["test_loss"] < 7
    assert f"test at 5 | loss {last['test_loss']:.4f}" in printed["read"]


def test_what_was_written_is_described(logs):
    description = json.loads(Path(f"{logs[2]}.json").read_text())
    assert description["samples"] == 20 and description["window"] == 32
    assert description["positions"]["pose_target_schedule"] == ["0:128", "8:512"]
    assert description["sampler"]["boundaries"] == [10, 32]
