"""Runs that are told to stop, that keep few checkpoints, that compute activations twice: each gives
the losses of the run that does none of it."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pose_megatron.checkpoints.megatron import directory
from pose_megatron.checkpoints.megatron.torch_dist import open_weights
from pose_megatron.runtime.megatron_core import common_state_is_an_object
from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
WORDS = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 2 --vocab-size 257 --seq-length 32
    --max-position-embeddings 256 --rope-scaling linear --init-method-std 0.1 --split 100,0,0
    --micro-batch-size 2 --global-batch-size 4 --num-workers 0 --lr 1e-2 --log-interval 1""".split()


class Job:
    """A run of pretrain_pose.py, its log as {iteration: values}, its stages folder."""

    def __init__(self, folder: Path, corpus: str):
        self.folder, self.corpus = folder, corpus

    def start(self, name: str, *words, ranks: int = 1) -> subprocess.Popen:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [
            sys.executable,
            "-u",
            *(launch if ranks > 1 else []),
            str(ROOT / "pretrain_pose.py"),
            *WORDS,
            "--data-path",
            self.corpus,
            "--log-file",
            str(self.folder / f"{name}.jsonl"),
        ]
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        return subprocess.Popen(
            [*command, *map(str, words)],
            env=env | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def log(self, name: str) -> dict[int, dict]:
        lines = (self.folder / f"{name}.jsonl").read_text().splitlines()
        return {row["iteration"]: row for row in map(json.loads, lines)}

    def run(self, name: str, *words, ranks: int = 1) -> tuple[dict[int, dict], str]:
        process = self.start(name, *words, ranks=ranks)
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, out[-2000:] + err[-2000:]
        return self.log(name), out


@pytest.fixture(scope="module")
def job(tmp_path_factory, stdlib_corpus):
    return Job(tmp_path_factory.mktemp("jobs"), stdlib_corpus)


@pytest.fixture(scope="module")
def straight(job):
    return job.run(
        "straight",
        "--train-iters",
        6,
        "--lr-decay-style",
        "constant",
        "--save",
        job.folder / "straight",
        "--save-interval",
        2,
        "--save-retain",
        2,
    )


def losses(log: dict[int, dict]) -> dict[int, tuple]:
    return {step: (row["loss"], row["grad_norm"], row["lr"]) for step, row in log.items()}


def test_a_signal_saves_and_the_same_command_goes_on(job, straight):
    """SIGTERM in the middle; a restart of the very same command reaches the end exactly."""
    base, folder = job.folder / "straight", job.folder / "stopped"
    usual = ["--lr-decay-style", "constant", "--seed", 7]
    words = [*usual, "--pretrained-checkpoint", base, "--load", folder, "--save", folder]
    process = job.start("stopped", "--train-iters", 100000, *words)
    for line in process.stdout:
        if line.startswith("iteration      5/"):
            process.send_signal(signal.SIGTERM)
            break
    rest, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    at = int(re.search(r"stopped at (\d+) by SIGTERM", rest)[1])
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == str(at)
    stopped = losses(job.log("stopped"))
    assert max(stopped) == at
    end = at + 5
    again, _ = job.run("again", "--train-iters", end, *words)
    assert min(again) == at + 1 and max(again) == end
    whole, _ = job.run("whole", "--train-iters", end, *usual, "--load", base, "--finetune")
    assert stopped | losses(again) == losses(whole)


def test_only_the_last_checkpoints_are_kept(job, straight):
    kept = sorted(p.name for p in (job.folder / "straight").glob("iter_*"))
    assert kept == ["iter_0000004", "iter_0000006"]


def test_a_time_limit_saves_and_stops(job):
    log, out = job.run(
        "limited",
        "--train-iters",
        100000,
        "--exit-duration-in-mins",
        0.01,
        "--save",
        job.folder / "limited",
        "--lr-decay-style",
        "constant",
    )
    at = max(log)
    assert f"stopped at {at} by --exit-duration-in-mins" in out and at < 100000
    tracker = job.folder / "limited" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == str(at)


@pytest.mark.parametrize(
    "words",
    [
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
        "--recompute-granularity selective",
    ],
)
def test_recomputation_changes_no_loss(job, straight, words):
    log, _ = job.run(words, "--train-iters", 6, "--lr-decay-style", "constant", *words.split())
    assert losses(log) == losses(straight[0])


def test_wsd_is_constant_and_then_decays_to_the_minimum(job):
    log, _ = job.run(
        "wsd",
        "--train-iters",
        6,
        "--lr-decay-style",
        "WSD",
        "--min-lr",
        1e-3,
        "--lr-wsd-decay-iters",
        4,
        "--lr-wsd-decay-style",
        "linear",
    )
    # Two steps at the peak, then a straight line over four steps towards the minimum.
    expected = [1e-2, 1e-2, 1e-2, 7.75e-3, 5.5e-3, 3.25e-3]
    assert [log[i]["lr"] for i in range(1, 7)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr-decay-style WSD", "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
        ("--recompute-granularity full", "--recompute-granularity full needs --recompute-method"),
        ("--exit-duration-in-mins 5", "--exit-duration-in-mins needs a folder to save to"),
        ("--pretrained-checkpoint {}/nowhere", "nowhere is not a checkpoint folder"),
        ("--save {} --save-retain 0", "--save-retain must be at least 1, not 0"),
    ],
)
def test_mistakes_are_named(job, words, message, refusals):
    assert message in refusals[words]


@pytest.fixture(scope="module")
def refusals(job, request):
    marks = test_mistakes_are_named.pytestmark[0].args[1]

    def refuse(words: str) -> str:
        process = job.start("refused", "--train-iters", 2, *words.format(job.folder).split())
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1 and "Traceback" not in err
        return err

    commands = [words for words, _ in marks]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(refuse, commands), strict=True))


def test_a_checkpoint_written_in_the_background_is_the_same(job):
    folder = job.folder / "async"
    usual = ["--lr-decay-style", "constant", "--use-distributed-optimizer"]
    whole, _ = job.run(
        "async", "--train-iters", 6, *usual, "--save", folder, "--save-interval", 2, "--async-save"
    )
    (folder / "latest_checkpointed_iteration.txt").write_text("4")
    on, _ = job.run("async on", "--train-iters", 6, *usual, "--load", folder)
    assert losses(on) == {step: losses(whole)[step] for step in (5, 6)}


def test_the_optimizer_must_be_the_one_that_saved(job, straight):
    process = job.start(
        "other",
        "--train-iters",
        8,
        "--load",
        job.folder / "straight",
        "--use-distributed-optimizer",
    )
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "Traceback" not in err
    assert "was saved without --use-distributed-optimizer: resume the same way" in err


@pytest.mark.parametrize("damage", ["*.distcp", "common.pt", "metadata.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_can_be_taken(
    job, straight, tmp_path, damage
):
    folder = shutil.copytree(job.folder / "straight", tmp_path / "damaged")
    for file in (folder / "iter_0000006").glob(damage):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        if damage == "metadata.json":
            file.unlink()
    words = ["--train-iters", 6, "--lr-decay-style", "constant", "--load", folder]
    if damage == "*.distcp":
        process = job.start("damaged", *words)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1 and err.count("error:") == 1 and "Traceback" not in err
        assert "iter_0000006 cannot be loaded" in err
    log, out = job.run(f"fell back {damage}", *words, "--load-fallback")
    assert f"checkpoint {folder}/iter_0000006" in out  # named, with what is wrong
    assert f"falling back to {folder}/iter_0000004" in out
    assert losses(log) == {step: losses(straight[0])[step] for step in (5, 6)}


@pytest.mark.parametrize("background", [(), ("--async-save",)])
def test_a_run_killed_again_and_again_comes_to_the_same_end(job, straight, background):
    """SIGKILL at arbitrary instants of a run that saves at every step, most of its time."""
    folder, chance = job.folder / f"killed{len(background)}", random.Random(len(background))
    words = [
        "--train-iters",
        6,
        "--lr-decay-style",
        "constant",
        "--load",
        folder,
        "--save",
        folder,
        "--save-interval",
        1,
        "--pretrained-checkpoint",
        folder.with_suffix(".start"),
        *background,
    ]
    job.run("start", "--train-iters", 1, "--lr", 0, "--save", folder.with_suffix(".start"))
    name = f"killed {background}"
    for _ in range(2):
        process = job.start(name, *words)
        for line in process.stdout:
            if line.startswith("iteration"):
                time.sleep(chance.uniform(0, 0.15))
                process.kill()
                break
        # Read to the end: what the killed rank had started has ended too, or this would wait.
        process.communicate(timeout=PATIENCE)
    job.run(name, *words)
    assert losses(job.log(name)) == losses(straight[0])


KILLED_BEFORE_COMMON_PT = """
import os, signal, sys
from pathlib import Path

replace = Path.replace

def killed(self, target):
    if self.name == "common.pt.tmp" and "iter_0000002" in str(self):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

Path.replace = killed
from pose_megatron.pretrain import main

sys.exit(main())
"""


@pytest.mark.skipif(
    not common_state_is_an_object(),
    reason="before 0.19, megatron-core itself writes common.pt, before metadata.json",
)
def test_a_kill_before_common_pt_is_written_loses_nothing(job, tmp_path):
    """megatron-core 0.19 has completed the checkpoint, and our common.pt beside it is missing."""
    words = f"--train-iters 2 --load {tmp_path} --save {tmp_path} --save-interval 1".split()
    process = subprocess.run(
        [sys.executable, "-c", KILLED_BEFORE_COMMON_PT, *WORDS, "--data-path", job.corpus, *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    cut = tmp_path / "iter_0000002"
    assert (cut / "metadata.json").is_file() and not (cut / "common.pt").is_file()
    assert directory.find(tmp_path).iteration == 1
    weights = open_weights(tmp_path, 2)
    killed = {name: weights[name] for name in weights.shapes}
    job.run("after the kill", *words)
    assert (cut / "common.pt").is_file() and directory.find(tmp_path).iteration == 2
    weights = open_weights(tmp_path, 2)
    assert all(torch.equal(killed[name], weights[name]) for name in weights.shapes)
