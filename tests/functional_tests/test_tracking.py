"""One run with every sink: TensorBoard and Weights & Biases hold what the JSON log holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
SCALARS = (
    "loss",
    "grad_norm",
    "lr",
    "tokens_per_second_per_rank",
    "peak_memory_bytes",
    "model_flops_per_second_per_rank",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, stdlib_corpus):
    folder = tmp_path_factory.mktemp("tracked")
    words = f"""
        --num-layers 2 --hidden-size 32 --num-attention-heads 2 --vocab-size 257 --seq-length 32
        --max-position-embeddings 256 --rope-scaling linear --micro-batch-size 2 --num-workers 0
        --train-samples 8 --split 90,10,0 --eval-interval 2 --eval-iters 1 --log-interval 1
        --data-path {stdlib_corpus} --log-file {folder}/log.jsonl --tensorboard-dir {folder}/board
        --wandb-project pose --wandb-exp-name first --wandb-save-dir {folder}/tracked""".split()
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    run = subprocess.run(
        [sys.executable, str(ROOT / "pretrain_pose.py"), *words],
        env=env | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return folder, rows, run.stdout


def test_tensorboard_holds_what_the_json_holds(run):
    folder, rows, _ = run
    board = EventAccumulator(str(folder / "board"))
    board.Reload()
    for name in (*SCALARS, "valid_loss"):
        expected = [(row["iteration"], row[name]) for row in rows if name in row]
        assert len(expected) == (2 if name == "valid_loss" else 4)
        found = [(event.step, event.value) for event in board.Scalars(name)]
        assert found == [(i, pytest.approx(value, rel=1e-6)) for i, value in expected]


def test_weights_and_biases_holds_it_offline(run):
    folder, rows, _ = run
    (file,) = (folder / "tracked").glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    for row in rows:
        for name in {"loss", "grad_norm", "valid_loss"} & row.keys():
            assert name.encode() in content and json.dumps(row[name]).encode() in content
    for words in (b"first", b"max_position_embeddings"):  # its name and its flags
        assert words in content


def test_the_line_says_throughput_and_memory(run):
    _, rows, out = run
    # A process with torch in it: a figure in other units would be far off.
    assert all(2**27 < row["peak_memory_bytes"] < 2**33 for row in rows if "loss" in row)
    for words in (
        "iteration 1/4 | samples 2 | batch 2 |",
        "tokens/s per rank |",
        "TFLOP/s |",
        " GiB | left ",
    ):
        assert words in out
    assert "MFU" not in out  # of a CPU no peak is known
