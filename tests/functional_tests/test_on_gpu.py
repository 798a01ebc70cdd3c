"""Training on a GPU beside the same training on a CPU, from the same weights."""

import pytest

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
