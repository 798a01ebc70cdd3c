"""Whole programs on the fake GPU: train, save, resume, evaluate; and the benchmark of a real one."""

import json

import pytest

from tests.fake_gpu.environment import ROOT
from tests.shapes import flags

WINDOW, TARGET = 128, 512


@pytest.fixture(scope="module")
def trained(on_fake_gpu, corpus, tmp_path_factory):
    """(the folder of checkpoints, what the run printed, what its resumption printed)"""
    folder = tmp_path_factory.mktemp("trained") / "checkpoints"
    words = flags("small", WINDOW, f"--bf16 --data-path {corpus} --num-workers 0 --log-interval 1")
    words += f"--max-position-embeddings {TARGET} --rope-scaling yarn --split 80,20,0".split()
    words += f"--eval-interval 2 --eval-iters 1 --save {folder} --async-save".split()
    program = ROOT / "pretrain_pose.py"
    first = on_fake_gpu(program, *words, "--train-iters", "2")
    second = on_fake_gpu(program, *words, "--train-iters", "4", "--load", folder)
    return folder, first, second


def test_a_run_finds_the_gpu_and_saves(trained):
    folder, first, _ = trained
    assert "NVIDIA H100 80GB HBM3" in first and "NCCL" in first
    assert (folder / "iter_0000002").is_dir()


def test_it_goes_on_from_its_checkpoint(trained):
    folder, _, second = trained
    assert "of which 2 steps" in second
    assert (folder / "latest_checkpointed_iteration.txt").read_text().strip() == "4"


def test_a_checkpoint_is_evaluated_in_chunks(trained, on_fake_gpu, corpus, tmp_path):
    folder, *_ = trained
    output = tmp_path / "results.jsonl"
    printed = on_fake_gpu(
        ROOT / "tools/evaluate_perplexity.py",
        *f"--load {folder} --data-path {corpus} --context-lengths 128 512 --bf16".split(),
        *f"--batch-tokens 128 --max-documents 2 --output {output}".split(),
    )
    assert "bfloat16 on NVIDIA H100" in printed
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["context_length"] for row in rows if "context_length" in row} == {128, 512}


def test_the_benchmark_of_a_real_gpu_runs_to_its_end(on_fake_gpu, tmp_path):
    output = tmp_path / "gpu.json"
    on_fake_gpu(ROOT / "benchmarks/gpu/run.py", "--dry", "--output", output)
    written = json.loads(output.read_text())
    assert written["device"] == "NVIDIA H100 80GB HBM3"
    rows = {name: part["rows"] for name, part in written["parts"].items()}
    timed = {(row["of"], row["how"]) for row in rows["kernels"]}
    assert timed >= {(of, how) for of in ("rotary", "loss") for how in ("a copy", "unfused")}
    assert [row["window"] for row in rows["steps"]] == [128, 256]
    for row in rows["steps"]:
        assert row["pose"]["peak_bytes"] > 0 and row["stock"]["mfu"] > 0 and row["ratio"] > 0
    assert [row["kind"] for row in rows["full_length"]] == ["pose", "full", "full"]
    assert [row["tokens"] for row in rows["evaluation"]] == [512, 1024]
    assert not any("error" in row for part in rows.values() for row in part)
