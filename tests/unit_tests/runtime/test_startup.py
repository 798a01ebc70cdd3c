"""What programs do before megatron-core is imported: they refuse a wrong one, and mute lines that no
user can act upon."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PATH = os.environ.get("PYTHONPATH", "")
RUN = ["--train-iters", "1"]
EVALUATE = ["--load", "run", "--context-lengths", "32", "--output", "results.jsonl"]
INSTALL = (
    "pip install 'megatron-core==0.16.1' on Python 3.11, "
    "'megatron-core>=0.19.2,<0.20' on Python 3.12 and 3.13"
)
# Hides every megatron-core that is installed, so that the one on PYTHONPATH alone is found.
HIDE = """
import importlib.util, runpy, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "megatron" else found(name, *rest)
sys.argv = [{program!r}, "--train-iters", "1"]
runpy.run_path({program!r}, run_name="__main__")
"""


def run(*command, **env):
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )


def fake_core(folder: Path, release: tuple[int, int, int]) -> Path:
    """megatron/core/package_info.py, as megatron-core 0.15 has it."""
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text(
        "MAJOR, MINOR, PATCH = {}, {}, {}\n".format(*release)
        + '__version__ = ".".join(map(str, (MAJOR, MINOR, PATCH)))\n'
    )
    for package in (core, core.parent):
        (package / "__init__.py").touch()
    return core


def assert_one_sentence(done, program, sentence):
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{program}: error: {sentence}\n"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("pretrain_pose.py", RUN),
        ("tools/evaluate_perplexity.py", [*EVALUATE, "--data-path", "corpus"]),
        ("tools/evaluate_passkey.py", EVALUATE),
    ],
)
def test_a_megatron_core_that_is_too_old_is_named(program, words, tmp_path):
    core = fake_core(tmp_path, (0, 15, 0))
    done = run(program, *words, PYTHONPATH=f"{tmp_path}{os.pathsep}{PATH}")
    sentence = f"megatron-core 0.15.0 in {core} is older than 0.16.1: {INSTALL}"
    assert_one_sentence(done, Path(program).name, sentence)


def test_without_megatron_core_a_program_says_what_to_install():
    done = run("-c", HIDE.format(program="pretrain_pose.py"), PYTHONPATH=PATH)
    assert_one_sentence(done, "pretrain_pose.py", f"megatron-core is not installed: {INSTALL}")


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("pretrain_pose.py", ["--bad-flag"], "unrecognized arguments: --bad-flag"),
        ("pretrain_pose.py", [*RUN, "--rope-scaling", "yarn", "--lr", "-1"], "--lr must be at least"),
        ("pretrain_pose.py", [*RUN, "--config", "{}"], "line 2: lr is in line 1 already"),
        ("tools/materialize_positions.py", ["--output", "x", "--bad-flag"], "--bad-flag"),
        ("tools/materialize_positions.py", ["--output", "x", "--lr", "nan"], "--lr must be finite"),
        ("tools/evaluate_perplexity.py", [*EVALUATE, "--data-path", "x", "--stride", "0"], "--stride"),
        ("tools/evaluate_perplexity.py", [*EVALUATE, "--data-path", "x", "--stride", "33"], "--stride"),
        ("tools/evaluate_passkey.py", [*EVALUATE, "--rope-scaling", "linaer"], "--rope-scaling"),
        ("tools/evaluate_passkey.py", [*EVALUATE, "--needles", "33"], "--needles: must be in [1, 32]"),
        ("tools/evaluate_ruler.py", [*EVALUATE, "--tasks", "single", "niah"], "invalid choice: 'niah'"),
        ("tools/evaluate_ruler.py", [*EVALUATE, "--needles", "1001"], "--needles: must be in [1, 1000]"),
        ("tools/evaluate_ruler.py", [*EVALUATE, "--values", "verbs"], "--values: invalid choice"),
        ("tools/checkpoint/verify.py", ["--megatron", "a", "--hf", "b", "--tokens", "1"], "--tokens"),
        ("tools/checkpoint/convert.py", ["--iteration", "-1"], "--iteration: must be at least 0"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_answered_before_anything_large_is_imported(
    program, words, message, tmp_path
):
    (tmp_path / "run.yaml").write_text("lr: 1\nlr: 2\n")
    words = [word.format(tmp_path / "run.yaml") for word in words]
    done = run("-X", "importtime", program, *words, PYTHONPATH=PATH)
    assert done.returncode in (1, 2) and not done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "megatron.core", "transformers"}
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert f"{Path(program).name}: error: " in said[-1] and message in said[-1]


def test_ranks_say_it_once(tmp_path):
    core = fake_core(tmp_path, (0, 15, 0))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, *launch, "pretrain_pose.py", *RUN],
        cwd=ROOT,
        env=env | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{PATH}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.count(f"megatron-core 0.15.0 in {core} is old") == 1


def test_a_run_prints_no_line_that_is_not_ours(tmp_path, make_corpus):
    """Neither megatron-core's warnings nor PyTorch's, from the start to the save and the load."""
    corpus = make_corpus([[*range(200), 256]])
    run_twice = f"""
        --num-layers 1 --hidden-size 16 --num-attention-heads 2 --vocab-size 257 --seq-length 32
        --max-position-embeddings 64 --rope-scaling linear --split 100,0,0 --micro-batch-size 1
        --global-batch-size 1 --num-workers 0 --lr 1e-2 --use-distributed-optimizer
        --data-path {corpus} --load {tmp_path}/run --save {tmp_path}/run --train-iters""".split()
    for iterations in ("1", "2"):
        done = run("pretrain_pose.py", *run_twice, iterations, PYTHONPATH=PATH)
        assert done.returncode == 0, done.stderr
        lines = done.stderr.splitlines()
        # True where PyTorch is a CUDA build and there is no driver: for its user to know.
        lines = [line for line in lines if "No CUDA runtime is found" not in line]
        assert len(lines) == 1 and lines[0].startswith(f"{corpus}, train: "), done.stderr
