"""A run from materialised samples has the losses of the run that draws them, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A blend, packed, with a sampler that reads tokens, a plain share and a target that grows.
FLAGS = """
    --seq-length 32 --max-position-embeddings 512 --rope-scaling linear --num-layers 2
    --hidden-size 32 --num-attention-heads 2 --vocab-size 257 --micro-batch-size 2
    --global-batch-size 4 --train-iters 5 --num-workers 0 --lr 1e-2 --log-interval 1
    --data-mode packed --position-sampler pose-boundary --pose-boundaries 10 32
    --pose-num-chunks 4 --pose-plain-fraction 0.25 --pose-target-schedule 0:128 8:512
    --split 1,0,0""".split()


def run(root: Path, program: str, *words: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    done = subprocess.run([sys.executable, str(root / program), *words], capture_output=True,
                          text=True, timeout=150, env=env | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def logs(root, stdlib_corpus, tmp_path_factory):
    """{name: steps} of a run that draws its samples and of one that reads them, and the folder."""
    folder = tmp_path_factory.mktemp("materialize")
    prefix = str(folder / "samples" / "pose")
    flags = [*FLAGS, "--data-path", "0.7", stdlib_corpus, "0.3", stdlib_corpus]
    said = {
        "tool": run(root, "tools/materialize_positions.py", "--output", prefix, *flags),
        "drawn": run(root, "pretrain_pose.py", *flags, "--log-file", str(folder / "drawn.jsonl")),
        "read": run(root, "pretrain_pose.py", *FLAGS[:-2], "--materialized", prefix,
                    "--test-data-path", stdlib_corpus, "--eval-iters", "2",
                    "--log-file", str(folder / "read.jsonl")),
    }
    steps = {name: list(map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines()))
             for name in ("drawn", "read")}
    return steps, said, prefix


def test_the_losses_are_the_same_bits(logs):
    steps, said, prefix = logs
    drawn, read = steps["drawn"], [step for step in steps["read"] if "loss" in step]
    assert len(drawn) == len(read) == 5
    for one, other in zip(drawn, read, strict=True):
        for name in ("loss", "grad_norm", "lr", "consumed_samples"):
            assert one[name] == other[name]
    assert len({step["loss"] for step in drawn}) == 5
    assert f"samples    read from {prefix}" in said["read"]
    assert "20 samples of 32 tokens" in said["tool"]


def test_a_test_set_of_its_own_is_read_after_the_last_step(logs):
    steps, said, _ = logs
    (last,) = [step for step in steps["read"] if "test_loss" in step]
    assert last["iteration"] == 5 and 3 < last["test_loss"] < 7
    assert f"test at 5 | loss {last['test_loss']:.4f}" in said["read"]


def test_what_was_written_is_described(logs):
    description = json.loads(Path(f"{logs[2]}.json").read_text())
    assert description["samples"] == 20 and description["window"] == 32
    assert description["positions"]["pose_target_schedule"] == ["0:128", "8:512"]
    assert description["sampler"]["boundaries"] == [10, 32]
