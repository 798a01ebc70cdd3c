"""The paper in small, in its smallest profile: it runs to its end, and again without work."""

import json
import os
import subprocess
import sys
import time

import psutil

from tests.processes import PATIENCE

FLAGS = ["--profile", "smoke", "--tables", "table-4", "--jobs", "2"]


def run(root, folder):
    command = [sys.executable, "examples/reproduce/run.py", *FLAGS, "--output", folder]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )


def test_it_runs_to_its_end_and_keeps_what_is_done(root, tmp_path):
    done = run(root, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "table-4.jsonl").read_text().splitlines()]
    assert [(row["name"], row["context_length"]) for row in rows] == [
        (f"text {content}", length)
        for content in ("uniform", "contiguous", "aligned")
        for length in (64, 128)
    ]
    # two steps from nearly fresh weights: a guess among 512 tokens
    assert all(5.5 < row["loss"] < 6.5 and len(row["by_seed"]) == 2 for row in rows)
    assert len({row["loss"] for row in rows}) == len(rows)
    report = (tmp_path / "report.md").read_text()
    assert "Table 4: which text the later chunks have" in report

    # one run is lost: only that is made again, with the same figures
    (tmp_path / "done/table-4-text-aligned-2").unlink()
    again = run(root, tmp_path)
    assert [line.partition(":")[0] for line in again.stdout.splitlines()[:1]] == [
        "table-4-text-aligned-2"
    ]
    assert [
        json.loads(line) for line in (tmp_path / "table-4.jsonl").read_text().splitlines()
    ] == rows


def test_a_run_that_fails_names_its_log(root, tmp_path):
    for name in ("corpus", "tokenizer", "train-text", "test-text", "recall-text"):
        (tmp_path / "done").mkdir(exist_ok=True)
        (tmp_path / "done" / name).touch()
    done = run(root, tmp_path)
    assert done.returncode == 1
    log = tmp_path / "logs/base-llama.log"
    assert done.stderr == (
        f"base-llama: exit code 1, see {log}: pretrain_pose.py: error: "
        f"--tokenizer-model {tmp_path}/tokenizer: no such file or folder\n"
    )
    assert "Traceback" not in done.stderr


def test_a_stop_ends_what_runs(root, tmp_path):
    command = [sys.executable, "examples/reproduce/run.py", *FLAGS, "--output", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(root)}
    job = subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "logs/base-llama.log"
    deadline = time.monotonic() + PATIENCE
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    started = psutil.Process(job.pid).children(recursive=True)
    assert started
    job.terminate()
    assert job.communicate(timeout=PATIENCE)[1] == "interrupted; the same command goes on\n"
    assert job.returncode == 1
    assert not psutil.wait_procs(started, timeout=PATIENCE)[1]
