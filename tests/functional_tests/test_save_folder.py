"""--save is one run's: what other runs have left there is neither overwritten nor removed."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from pose_megatron.checkpoints.megatron import directory
from tests.functional_tests.test_stop_and_go import Job
from tests.processes import PATIENCE


@pytest.fixture(scope="module")
def start(stdlib_corpus, tmp_path_factory):
    """start(*words): pretrain_pose.py as a process."""
    job = Job(tmp_path_factory.mktemp("logs"), stdlib_corpus)
    return lambda *words: job.start("log", "--lr-decay-style", "constant", *words)


def end(process: subprocess.Popen, code: int = 0) -> str:
    out = "".join(process.communicate(timeout=PATIENCE))
    assert process.returncode == code, out[-4000:]
    assert "Traceback" not in out
    return out


def error(process: subprocess.Popen) -> str:
    out = end(process, 1)
    assert out.count("error: ") == 1, out
    return out.partition("error: ")[2]


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    """Iterations 1 to 4 of a run."""
    folder = tmp_path_factory.mktemp("whole") / "save"
    end(start("--train-iters", 4, "--save", folder, "--save-interval", 1))
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "save")


def test_a_lost_tracker_loses_nothing(start, folder):
    """The same command goes on; before, it began at step 0 and overwrote whole checkpoints."""
    shutil.rmtree(folder / "iter_0000004")  # and of the newest only a half is left
    (folder / "iter_0000004").mkdir()
    (folder / directory.TRACKER).unlink()
    old = content(folder)
    words = ["--load", folder, "--save", folder, "--save-interval", 1]
    out = end(start("--train-iters", 5, *words))
    assert (
        f"{folder} has no {directory.TRACKER}: going on from the newest whole checkpoint, 3" in out
    )
    assert "iteration 4/5" in out and "iteration 3/5" not in out
    assert directory.find(folder).iteration == 5
    now = content(folder)
    assert all(now[path] == data for path, data in old.items())


@pytest.mark.parametrize("words", ["", "--finetune --load FOLDER", "--finetune --load OTHER"])
def test_checkpoints_of_another_run_are_not_touched(start, folder, whole, words):
    old = content(folder)
    words = words.replace("FOLDER", str(folder)).replace("OTHER", str(whole)).split()
    said = error(start("--train-iters", 9, "--save", folder, "--save-retain", 1, *words))
    assert (
        f"--save {folder} holds checkpoints up to iteration 4, and this run does not go on" in said
    )
    assert f"add --load {folder}" in said and "--pretrained-checkpoint" in said
    assert content(folder) == old


def test_a_run_that_is_resumed_elsewhere_leaves_what_is_there(start, folder, whole):
    assert "does not go on from them" in error(
        start("--train-iters", 9, "--load", whole, "--save", folder)
    )


def test_two_runs_do_not_share_a_folder(start, tmp_path):
    """The second is refused, names the first, and goes on once that was killed."""
    save = tmp_path / "save"
    words = ["--train-iters", 100000, "--load", save, "--save", save, "--save-interval", 20]
    first = start(*words)
    for line in first.stdout:
        if line.startswith("saved "):
            break
    said = error(start(*words))
    assert f"--save {save}: process {first.pid} on " in said and "is at work on it; wait" in said
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    at = directory.find(save).iteration
    words[1] = at + 1
    out = end(start(*words))
    assert f"iteration {at + 1}/{at + 1}" in out
    assert not (save / ".save.owner").exists()


def in_the_way(folder: Path, kind: str) -> Path:
    if kind == "a file":
        (folder / "save").touch()
    if kind == "a file above it":
        (folder / "above").touch()
        return folder / "above" / "save"
    return folder / "save"


@pytest.mark.parametrize("kind", ["a file", "a file above it"])
def test_a_folder_that_cannot_be_written_is_named_at_the_start(start, tmp_path, kind):
    save = in_the_way(tmp_path, kind)
    out = end(start("--train-iters", 30, "--save", save, "--save-interval", 30), 1)
    assert f"error: --save {save} cannot be written: " in out
    assert "iteration" not in out


def test_a_folder_in_the_place_of_a_tokenizer_file_is_named_at_the_start(start, folder):
    for name in ("tokenizer", "other/tokenizer/tokenizer_config.json"):
        (folder / name).mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    words = ["--load", folder, "--finetune", "--save", folder / "other"]
    out = end(start("--train-iters", 30, *words), 1)
    assert (
        "other/tokenizer/tokenizer_config.json is in the way of the tokenizer's tokenizer_" in out
    )
    assert "iteration 1/" not in out
