"""A GPU beside a CPU: training from the same weights, evaluation, Megatron's pretrain(), kernels."""

import json
import subprocess
import sys

import pytest

from pose_megatron.runtime.megatron_core import common_state_is_an_object
from tests.functional_tests.megatron_runs import LAYOUTS, deviation, ours, theirs
from tests.functional_tests.test_stop_and_go import Job, losses

CPU, GPU = "cpu", "cuda"
WORDS = ["--train-iters", "4", "--lr-decay-style", "constant"]

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def job(tmp_path_factory, stdlib_corpus):
    return Job(tmp_path_factory.mktemp("devices"), stdlib_corpus)


@pytest.fixture(scope="module")
def on_cpu(job):
    """Losses and gradient norms, and the folder of a checkpoint."""
    save = ["--save", job.folder / "cpu"]
    log, _ = job.run("cpu", *WORDS, *save, "--device", CPU)
    return losses(log)


@pytest.mark.parametrize(
    "more",
    [[], ["--fused-rotary", "off", "--fused-cross-entropy", "off", "--no-bias-swiglu-fusion"]],
    ids=["kernels", "pieces"],
)
def test_a_gpu_has_the_losses_of_a_cpu(job, on_cpu, more):
    log, _ = job.run(f"gpu {len(more)}", *WORDS, *more, "--device", GPU)
    for step, values in losses(log).items():
        assert values == pytest.approx(on_cpu[step], rel=1e-4)


def test_in_bfloat16_they_are_near(job, on_cpu):
    log, _ = job.run("bf16", *WORDS, "--bf16", "--device", GPU)
    for step, (loss, *_) in losses(log).items():
        assert loss == pytest.approx(on_cpu[step][0], rel=0.02)


def test_a_run_saved_on_a_cpu_goes_on_on_a_gpu(job, on_cpu):
    words = [*WORDS, "--train-iters", "6"]
    straight, _ = job.run("straight", *words, "--device", CPU)
    log, _ = job.run("resumed", *words, "--load", job.folder / "cpu", "--device", GPU)
    assert sorted(log) == [5, 6]
    for step, values in losses(log).items():
        assert values == pytest.approx(losses(straight)[step], rel=1e-4)


def output_of(root, file, program, *words) -> str:
    """The text of the file that a program writes."""
    command = [sys.executable, root / program, *words, "--output", file]
    subprocess.run([str(word) for word in command], cwd=root, check=True)
    return file.read_text()


def test_it_evaluates_as_a_cpu_does(root, job, on_cpu, stdlib_corpus, tmp_path):
    found = {}
    for device in (CPU, GPU):
        words = f"--load {job.folder / 'cpu'} --data-path {stdlib_corpus} --max-documents 3"
        words += f" --context-lengths 32 64 256 --fp32 --device {device}"
        file = tmp_path / f"{device}.jsonl"
        lines = output_of(root, file, "tools/evaluate_perplexity.py", *words.split()).splitlines()
        found[device] = [json.loads(line)["by_document"] for line in lines]
    assert len(found[CPU]) == 3
    for here, there in zip(found[GPU], found[CPU], strict=True):
        assert here == pytest.approx(there, rel=1e-5)


@pytest.mark.skipif(
    not common_state_is_an_object(), reason="megatron.training comes with megatron-core 0.19"
)
@pytest.mark.parametrize("name", ["1 rank", "Hybrid"])
def test_megatrons_pretrain_has_the_losses_of_our_trainer_on_a_cpu(
    tmp_path, stdlib_corpus, monkeypatch, name
):
    with monkeypatch.context() as on_a_cpu:
        on_a_cpu.setenv("CUDA_VISIBLE_DEVICES", "")
        wanted = ours(tmp_path, stdlib_corpus, "llama")
    found = theirs(tmp_path, stdlib_corpus, name, LAYOUTS[name])
    assert max(deviation(found, wanted)) < 1e-4


def test_the_kernels_are_as_exact_as_they_are_said_to_be(root, tmp_path):
    def errors(kernel):
        words = ["--only", "errors"]
        program = f"benchmarks/{kernel}_kernel.py"
        rows = json.loads(output_of(root, tmp_path / kernel, program, *words))["errors"]
        return [row for row in rows if row["how"] == "the kernel"]

    assert max(row["error"] for row in errors("rotary")) <= 2e-7
    for row in errors("cross_entropy"):
        assert row["loss"] < 3e-6  # nats
        assert row["gradient"] < (2**-8 if "bf16" in row["logits"] else 1e-7)
