"""Checkpoints on the way that all ranks write at once, and what can resume from them."""

import shutil

import pytest

from pose_megatron.checkpoints.megatron import directory
from tests.functional_tests.test_stop_and_go import Job, losses

WORDS = [
    *("--use-distributed-optimizer", "--overlap-grad-reduce", "--lr-decay-style", "constant"),
    "--no-dist-ckpt-optim-fully-reshardable",
]


@pytest.fixture(scope="module")
def job(tmp_path_factory, stdlib_corpus):
    return Job(tmp_path_factory.mktemp("periodic"), stdlib_corpus)


@pytest.fixture(scope="module")
def straight(job):
    save = ["--save", job.folder / "save", "--save-interval", 2]
    log, _ = job.run("straight", *WORDS, "--train-iters", 4, *save, ranks=2)
    return losses(log)


@pytest.fixture
def killed(job, straight, tmp_path):
    """What a run leaves that is killed after its first save."""
    folder = tmp_path / "killed"
    shutil.copytree(job.folder / "save", folder)
    shutil.rmtree(folder / "iter_0000004")
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    return folder


def test_only_the_last_one_is_gathered(job, straight):
    forms = [
        directory.optimizer_form(directory.find(str(job.folder / "save"), i).common) for i in (2, 4)
    ]
    assert forms == [directory.AS_IT_LIES, directory.RESHARDABLE]


@pytest.mark.parametrize("ranks", [2, 1])
def test_a_killed_run_goes_on_with_as_many_or_other_data_parallel_ranks(
    job, straight, killed, ranks
):
    words = [*WORDS, "--train-iters", 4, "--load", killed]
    log, _ = job.run(f"again on {ranks}", *words, ranks=ranks)
    found = losses(log)
    assert sorted(found) == [3, 4]
    for step, values in found.items():
        assert values == pytest.approx(straight[step], rel=0 if ranks == 2 else 1e-5)


def test_another_model_parallel_layout_is_refused(job, killed):
    words = [*WORDS, "--train-iters", "4", "--load", killed, "--tensor-model-parallel-size", "2"]
    process = job.start("refused", *words, ranks=2)
    _, err = process.communicate(timeout=600)
    assert process.returncode and "--tensor-model-parallel-size 1 -> 2. Resume in the same" in err


def test_the_last_one_goes_on_in_any_layout(job, straight):
    words = ["--train-iters", "5", "--load", job.folder / "save", "--lr-decay-style", "constant"]
    words += ["--use-distributed-optimizer", "--tensor-model-parallel-size", "2"]
    log, _ = job.run("another layout", *words, ranks=2)
    one, _ = job.run("one rank", *words[:-2])
    for step, values in losses(log).items():
        assert values == pytest.approx(losses(one)[step], rel=1e-5)
