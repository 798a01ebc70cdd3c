"""Runs that end before their time: by a signal in the middle of a step or of a validation, by a
helper that is killed, by a disk that is full. Each ends at once, with the last whole step on disk."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from pose_megatron.checkpoints.megatron import directory
from pose_megatron.checkpoints.megatron.torch_dist import open_weights
from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 2 --vocab-size 257 --seq-length 512
    --max-position-embeddings 2048 --rope-scaling linear --init-method-std 0.1 --split 60,40,0
    --micro-batch-size 2 --num-workers 1 --lr 1e-2 --lr-decay-style constant
    --log-interval 1""".split()
STEPS = 2
# Two steps of 4 samples, and then one that lasts for minutes.
ENDLESS_STEP = "--rampup-batch-size 4 3996 8 --global-batch-size 4000 --train-samples 9000"
SHORT_STEPS = f"--global-batch-size 4 --train-samples {4 * STEPS}"


@pytest.fixture
def start(tmp_path, stdlib_corpus):
    """start(words, ranks, limit): a run as a process, whose output is a file `process.log`."""
    started = []

    def begin(words: str, ranks: int = 1, file_limit: int | None = None):
        log = tmp_path / f"run_{len(started)}.log"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}

        def limit() -> None:
            if file_limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

        with log.open("w") as out:
            process = subprocess.Popen(
                [
                    sys.executable,
                    *(launch if ranks > 1 else []),
                    str(ROOT / "pretrain_pose.py"),
                    *MODEL,
                    "--data-path",
                    stdlib_corpus,
                    "--save",
                    str(tmp_path / "save"),
                    *words.split(),
                ],
                env=env,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=limit,
            )
        process.log = log
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            for one in (*psutil.Process(process.pid).children(recursive=True), process):
                one.kill()


def wait_for(process, line: str) -> None:
    while line not in process.log.read_text():
        assert process.poll() is None, process.log.read_text()[-4000:]
        time.sleep(0.05)


def ranks_of(process) -> list[psutil.Process]:
    found = psutil.Process(process.pid)
    ranks = [one for one in found.children() if "pretrain_pose.py" in " ".join(one.cmdline())]
    return [one for one in ranks if "RANK" in one.environ()] or [found]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, ""),
        (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    ],
)
def test_a_signal_in_the_middle_of_a_step(start, tmp_path, ranks, layout):
    """The step is called off on all ranks; what is saved is what a run of two steps saves."""
    process = start(f"{ENDLESS_STEP} {layout}", ranks)
    wait_for(process, f"iteration {STEPS}/")
    time.sleep(2)  # it is in the third step, which would last for minutes
    ranks_of(process)[-1].send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 0, process.log.read_text()[-4000:]
    log = process.log.read_text()
    assert f"Stopping: saving iteration {STEPS} (SIGTERM)" in log
    assert f"stopped at {STEPS} by SIGTERM" in log and f"iteration {STEPS + 1}/" not in log
    whole = start(f"{SHORT_STEPS} {layout} --save {tmp_path / 'whole'}", ranks)
    assert whole.wait(timeout=PATIENCE) == 0, whole.log.read_text()[-4000:]
    assert directory.find(tmp_path / "save").consumed_samples == 4 * STEPS
    stopped, wanted = (open_weights(tmp_path / name, STEPS) for name in ("save", "whole"))
    for name in wanted.shapes:
        assert torch.equal(stopped[name], wanted[name]), name


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_to_all_processes_in_the_middle_of_a_validation(start, tmp_path, name):
    """As a cluster sends it, also to the processes that load the samples."""
    process = start(f"{SHORT_STEPS} --eval-interval {STEPS - 1} --eval-iters 100000")
    wait_for(process, f"iteration {STEPS - 1}/")
    time.sleep(2)
    rank = psutil.Process(process.pid)
    for one in (*rank.children(recursive=True), rank):
        one.send_signal(getattr(signal, name))
    assert process.wait(timeout=PATIENCE) == 0, process.log.read_text()[-4000:]
    log = process.log.read_text()
    assert f"Stopping: saving iteration {STEPS - 1} ({name})" in log
    assert "validation at" not in log and "Traceback" not in log
    assert directory.find(tmp_path / "save").iteration == STEPS - 1


def test_the_clock_stops_a_validation(start, tmp_path):
    process = start(
        f"{SHORT_STEPS} --eval-interval {STEPS - 1} --eval-iters 100000 --exit-duration-in-mins 0.1"
    )
    assert process.wait(timeout=PATIENCE) == 0, process.log.read_text()[-4000:]
    log = process.log.read_text()
    assert f"Stopping: saving iteration {STEPS - 1} (--exit-duration-in-mins)" in log
    assert "validation at" not in log


def test_nothing_is_saved_where_nothing_was_trained(start, tmp_path):
    """A signal in the first step of all."""
    process = start("--global-batch-size 4000 --train-iters 2")
    wait_for(process, "training ")
    time.sleep(15)  # seconds of imports, and then of the first step
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 0, process.log.read_text()[-4000:]
    assert "Stopping: nothing was trained yet (SIGTERM)" in process.log.read_text()
    assert not directory.exists(tmp_path / "save")


def one_sentence(process, code: int = 1) -> str:
    """The only error of a run, which has ended with `code`."""
    assert process.wait(timeout=PATIENCE) == code, process.log.read_text()[-4000:]
    log = process.log.read_text()
    errors = re.findall(r"error: (.*)", log)
    assert len(errors) == 1, log[-4000:]
    return errors[0]


@pytest.mark.skipif(sys.platform != "linux", reason="what a rank forks is seen in /proc")
def test_a_killed_writer_is_noticed(start, tmp_path):
    """In the background a fork of the rank writes: stopped in the middle, and killed."""
    words = "--global-batch-size 4 --train-iters 100000 --async-save --save-interval 10"
    process = start(words + " --num-workers 0")
    wait_for(process, "saved ")
    whole = directory.find(tmp_path / "save").iteration
    rank = psutil.Process(process.pid)
    while not (forked := rank.children()):
        assert process.poll() is None
    forked[0].kill()
    error = one_sentence(process)
    assert "cannot be written: " in error and "killed, perhaps because memory ran out" in error
    assert directory.find(tmp_path / "save").iteration >= whole
    assert all((path / "metadata.json").is_file() for path in (tmp_path / "save").glob("iter_*"))


@pytest.mark.parametrize(("ranks", "words"), [(1, ""), (2, "--async-save")])
def test_a_full_disk_is_one_sentence(start, tmp_path, ranks, words):
    """Files may not grow beyond 20 kB: the weights do."""
    process = start(
        f"{SHORT_STEPS} --save-interval 1 --num-workers 0 {words}", ranks, file_limit=20_000
    )
    error = one_sentence(process)
    assert "save/iter_0000001 cannot be written: " in error and "MiB are free there" in error
    assert not list((tmp_path / "save").glob("iter_*"))
