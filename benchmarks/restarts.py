"""Whether killed jobs go on: real torchrun, real kills at random moments, counts.

Each trial trains a small model on two ranks, kills something of the job, starts again what a
cluster would start again, and compares every loss of every attempt with those of a job that nobody
killed. The exit code is 1 where a trial hung, failed, or had another loss.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from pose_megatron.runtime.startup import prepare_megatron

prepare_megatron()

import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 120, 10
SECONDS = 240  # beyond them it hangs
WORDS = f"""
    --num-layers 2 --hidden-size 32 --num-attention-heads 2 --vocab-size 257 --seq-length 32
    --max-position-embeddings 256 --rope-scaling linear --split 100,0,0 --micro-batch-size 2
    --global-batch-size 4 --num-workers 0 --lr 1e-3 --log-interval 1 --train-iters {STEPS}
    --save-interval {EVERY} --save-retain 2 --use-distributed-optimizer""".split()


class Hung(Exception):
    pass


class Job:
    """A job's folder, its agents, and the losses that it has logged."""

    def __init__(self, folder: Path, corpus: str, *more: str):
        folder.mkdir()
        self.log, self.output = folder / "log.jsonl", folder / "output"
        save = str(folder / "checkpoints")
        self._words = [*WORDS, "--data-path", corpus, "--load", save, "--save", save, *more]
        self._words += ["--log-file", str(self.log)]
        self._end = time.monotonic() + SECONDS
        self.agents: list[subprocess.Popen] = []

    def start(self, *launch: str) -> subprocess.Popen:
        """torchrun with these words."""
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        # Without it, an agent that joins later waits for an address that nobody sends (torch 2.13).
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        program = [sys.executable, "-m", "torch.distributed.run", *launch]
        with self.output.open("a") as out:
            agent = subprocess.Popen(
                [*program, str(ROOT / "pretrain_pose.py"), *self._words],
                env=env,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.agents.append(agent)
        return agent

    def losses(self) -> list[tuple[int, float, float]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [(row["iteration"], row["loss"], row["grad_norm"]) for row in rows]

    def wait_for_steps(self, count: int) -> None:
        """Until so many more steps are logged."""
        wanted = len(self.losses()) + count
        while len(self.losses()) < wanted:
            self._look()
            if all(agent.poll() is not None for agent in self.agents):
                raise RuntimeError("it ended before it was killed")

    def wait_for(self, found: Callable[[], list]) -> list:
        while not (result := found()):
            self._look()
        return result

    def finish(self) -> None:
        while any(agent.poll() is None for agent in self.agents):
            self._look()

    def _look(self) -> None:
        time.sleep(0.02)
        if time.monotonic() > self._end:
            raise Hung

    def ranks(self) -> list[psutil.Process]:
        """Of all agents, in the order of their ranks."""
        found = []
        for agent in self.agents:
            if agent.poll() is None:
                found += psutil.Process(agent.pid).children()
        return sorted(found, key=lambda one: int(one.environ().get("RANK", 0)))

    def end(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                for one in psutil.Process(agent.pid).children(recursive=True):
                    one.kill()
                agent.kill()
            agent.wait()


ONE_NODE = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "3")


def start_two_nodes(job: Job) -> tuple[str, ...]:
    """Two agents, of which the first keeps the rendezvous; the words to start another one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = (
        *("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--max-restarts"),
        *("3", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job"),
    )
    job.start(*launch)
    time.sleep(2)
    job.start(*launch)
    return launch


def kill_rank(job: Job, chance: random.Random) -> None:
    job.start(*ONE_NODE)
    for _ in range(2):
        job.wait_for_steps(chance.randint(1, STEPS // 4))
        chance.choice(job.wait_for(job.ranks)).kill()


def kill_both_ranks(job: Job, chance: random.Random) -> None:
    job.start(*ONE_NODE)
    job.wait_for_steps(chance.randint(1, STEPS // 2))
    for rank in job.wait_for(job.ranks):
        rank.kill()


def kill_agent(job: Job, chance: random.Random) -> None:
    job.start(*ONE_NODE)
    replace_agent(job, chance, signal.SIGKILL, ONE_NODE)


def kill_rank_of_two_nodes(job: Job, chance: random.Random) -> None:
    start_two_nodes(job)
    job.wait_for_steps(chance.randint(1, STEPS // 2))
    chance.choice(job.wait_for(job.ranks)).kill()


def replace_node(job: Job, chance: random.Random) -> None:
    replace_agent(job, chance, signal.SIGKILL, start_two_nodes(job))


def preempt(job: Job, chance: random.Random) -> None:
    job.start(*ONE_NODE)
    replace_agent(job, chance, signal.SIGTERM, ONE_NODE)


def replace_agent(
    job: Job, chance: random.Random, number: signal.Signals, launch: Sequence[str]
) -> None:
    """The last agent gets a signal, and once it has ended, another one takes its place."""
    job.wait_for_steps(chance.randint(1, STEPS // 2))
    job.agents[-1].send_signal(number)
    job.agents[-1].wait(timeout=SECONDS)
    job.start(*launch)


def kill_writer(job: Job, chance: random.Random) -> None:
    """What a rank forks to write a checkpoint in the background."""
    job.start(*ONE_NODE)
    job.wait_for_steps(chance.randint(1, STEPS // 2))

    def writers() -> list[psutil.Process]:
        return [child for rank in job.ranks() for child in rank.children()]

    chance.choice(job.wait_for(writers)).kill()


TRIALS = {
    "a rank, twice": kill_rank,
    "both ranks": kill_both_ranks,
    "the agent": kill_agent,
    "a rank of two nodes": kill_rank_of_two_nodes,
    "one of two nodes": replace_node,
    "a writer in the background": kill_writer,
    "SIGTERM": preempt,
}


def run(name: str, folder: Path, corpus: str, right: dict, chance: random.Random) -> str:
    """How one trial ends."""
    job = Job(folder, corpus, *(["--async-save"] if TRIALS[name] is kill_writer else []))
    try:
        TRIALS[name](job, chance)
        job.finish()
    except Hung:
        return "hung"
    except psutil.NoSuchProcess:
        return "missed"  # it had ended by itself just before
    finally:
        job.end()
    losses = job.losses()
    if losses != [right[row[0]] for row in losses]:
        return "other losses"
    return "recovered" if {row[0] for row in losses} == right.keys() else "failed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=7, help="how many [7]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    counts: dict[str, Counter[str]] = {name: Counter() for name in TRIALS}
    with tempfile.TemporaryDirectory(prefix="restarts-") as name:
        corpus = make_corpus(Path(name) / "corpus")
        straight = Job(Path(name) / "straight", corpus)
        straight.start(*ONE_NODE)
        straight.finish()
        right = {row[0]: row for row in straight.losses()}
        if len(right) != STEPS:
            print(straight.output.read_text()[-4000:])
            raise RuntimeError("the job that nobody kills does not end")
        chance = random.Random(args.seed)
        for number, trial in zip(range(args.trials), list(TRIALS) * args.trials, strict=False):
            folder = Path(name) / str(number)
            how = run(trial, folder, corpus, right, chance)
            counts[trial][how] += 1
            print(f"{trial}: {how}", flush=True)
            if how in ("hung", "failed", "other losses"):
                print((folder / "output").read_text()[-3000:], flush=True)
    columns = ("recovered", "hung", "failed", "other losses", "missed")
    print("\n| killed | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for trial, found in counts.items():
        print(f"| {trial} | " + " | ".join(str(found[how]) for how in columns) + " |")
    if args.output:
        args.output.write_text(json.dumps({k: dict(v) for k, v in counts.items()}, indent=1) + "\n")
    bad = sum(found[how] for found in counts.values() for how in ("hung", "failed", "other losses"))
    return 1 if bad else 0


def make_corpus(prefix: Path) -> str:
    """64 documents of 400 tokens."""
    torch.manual_seed(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin")
    for _ in range(64):
        builder.add_document(torch.randint(257, (400,)), [400])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


if __name__ == "__main__":
    sys.exit(main())
