"""Ranks and nodes are killed, and torchrun --max-restarts goes on: every loss is that of the run which
nobody killed. Two torchrun agents on one machine stand for two nodes."""

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
STEPS = 150
WORDS = f"""
    --num-layers 2 --hidden-size 32 --num-attention-heads 2 --vocab-size 257 --seq-length 32
    --max-position-embeddings 256 --rope-scaling linear --init-method-std 0.1 --split 100,0,0
    --micro-batch-size 2 --global-batch-size 4 --num-workers 0 --lr 1e-3 --log-interval 1
    --train-iters {STEPS} --save-interval 15 --save-retain 2 --use-distributed-optimizer""".split()


class Job:
    """Ranks of pretrain_pose.py that share a folder; `more` is for their environment."""

    def __init__(self, folder: Path, corpus: str, **more: str):
        self.folder, self.corpus, self.more = folder, corpus, more

    def agent(self, *launch) -> subprocess.Popen:
        save = str(self.folder / "checkpoints")
        words = [
            *WORDS,
            "--data-path",
            self.corpus,
            "--load",
            save,
            "--save",
            save,
            "--log-file",
            str(self.folder / "log.jsonl"),
        ]
        # On CPU also where there are GPUs: two ranks would share one.
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | self.more
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                *launch,
                str(ROOT / "pretrain_pose.py"),
                *words,
            ],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def losses(self) -> list[tuple]:
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [(row["iteration"], row["loss"], row["grad_norm"]) for row in rows]


def end(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out[-4000:]
    return out


@pytest.fixture(scope="module")
def one_node(tmp_path_factory, stdlib_corpus):
    job = Job(tmp_path_factory.mktemp("one"), stdlib_corpus)
    end(job.agent("--standalone", "--nproc-per-node", "2"))
    return dict(enumerate(job.losses(), 1))


def check_losses(losses, one_node):
    """Every step that an attempt logged is one node's, to the last bit; steps since the last checkpoint
    come twice."""
    assert losses == [one_node[row[0]] for row in losses]
    again = [b[0] for a, b in itertools.pairwise(losses) if b[0] <= a[0]]
    assert again and all(first % 15 == 1 and first > 1 for first in again)  # from a checkpoint
    assert {row[0] for row in losses} == set(range(1, STEPS + 1))


def test_killed_ranks_start_again(one_node, tmp_path, stdlib_corpus):
    job = Job(tmp_path, stdlib_corpus)
    agent = job.agent("--standalone", "--nproc-per-node", "2", "--max-restarts", "3")
    for rank in (1, 0):  # and in this order: rank 0 keeps nothing that the others need
        steps = len(job.losses()) + 30
        while len(job.losses()) < steps:
            assert agent.poll() is None, agent.communicate()[0][-4000:]
            time.sleep(0.05)
        ranks = psutil.Process(agent.pid).children()
        next(one for one in ranks if one.environ()["RANK"] == str(rank)).kill()
    end(agent)
    check_losses(job.losses(), one_node)


def wait_for(port: int) -> None:
    """Until something listens there."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"nothing listens at port {port}")


@pytest.mark.skipif(sys.platform != "linux", reason="kills what only Linux ends with its parent")
def test_a_node_is_killed_and_replaced(one_node, tmp_path, stdlib_corpus):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
        "--rdzv-id",
        "job",
        "--max-restarts",
        "2",
    ]
    # Without it, an agent that joins later waits for an address that nobody sends (torch 2.13).
    job = Job(tmp_path, stdlib_corpus, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    host = job.agent(*launch)
    wait_for(port)  # the first agent keeps the rendezvous
    lost = job.agent(*launch)
    while len(job.losses()) < 40:
        assert host.poll() is lost.poll() is None
        time.sleep(0.05)
    lost.kill()
    # Its rank holds the same pipe: this returns only once the rank has ended, too.
    lost.communicate(timeout=PATIENCE)
    replacement = job.agent(*launch)
    out = end(host)
    end(replacement)
    check_losses(job.losses(), one_node)
    assert out.count("saved ") >= STEPS // 15
