"""PoSE in Megatron's own pretrain(), run by torchrun: our trainer's losses, and either program goes
on from what the other has saved."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from pose_megatron.checkpoints.megatron import directory
from pose_megatron.runtime.megatron_core import common_state_is_an_object
from tests.functional_tests.megatron_runs import (
    LAYOUTS,
    MEGATRON,
    MODELS,
    ROOT,
    SAMPLES,
    SCHEDULE,
    STEPS,
    STOCK,
    deviation,
    launch,
    ours,
    start_weights,
    theirs,
)
from tests.processes import PATIENCE

pytestmark = pytest.mark.skipif(
    not common_state_is_an_object(), reason="megatron.training comes with megatron-core 0.19"
)
TOLERANCE = 1e-5  # relative, in float32
SAVE = ["--save-interval", "2", "--dist-ckpt-optim-fully-reshardable"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("megatron")


@pytest.fixture(scope="module")
def reference(folder, stdlib_corpus):
    """Our trainer's steps on one rank, by model."""
    return {model: ours(folder, stdlib_corpus, model) for model in MODELS}


@pytest.mark.parametrize(
    "name",
    [name for name in LAYOUTS if name not in ("1 rank, full recompute", "TP2", "PP2", "experts")],
)
def test_a_layout_has_the_losses_of_our_trainer(folder, stdlib_corpus, reference, name):
    layout = LAYOUTS[name]
    found = theirs(folder, stdlib_corpus, name, layout)
    assert max(deviation(found, reference[layout.model])) < TOLERANCE


def test_stock_rotary_embedding_is_seen(folder, stdlib_corpus, reference):
    (layout,) = STOCK.values()
    found = theirs(folder, stdlib_corpus, "stock", layout)
    loss, norm = deviation(found, reference["llama"])
    assert loss > 100 * TOLERANCE and norm > 100 * TOLERANCE


def cut(saved, iteration: int):
    """A copy of a checkpoint folder whose run ended at an earlier iteration."""
    copy = shutil.copytree(saved, saved.with_name(f"{saved.name} cut"))
    (copy / directory.TRACKER).write_text(str(iteration))
    return copy


@pytest.fixture(scope="module")
def their_run(folder, stdlib_corpus):
    """A run of Megatron's that saves after two steps and after four: its folder and its steps."""
    saved = folder / "theirs saved"
    layout = replace(LAYOUTS["1 rank"], words="--use-distributed-optimizer")
    weights = start_weights(folder, stdlib_corpus, "llama")
    words = ["--load", str(weights), "--finetune", "--rope-scaling", "yarn"]
    rows = theirs(folder, stdlib_corpus, "saving", layout, *words, "--save", str(saved), *SAVE)
    return saved, rows


def test_its_checkpoints_hold_the_interpolation(their_run, reference):
    saved, rows = their_run
    assert max(deviation(rows, reference["llama"])) < TOLERANCE
    model = directory.find(saved).model
    assert (model.rope_scaling.method, model.rope_scaling.factor) == ("yarn", 8.0)
    assert (model.max_position_embeddings, model.vocab_size) == (256, 257)


def test_our_trainer_goes_on_from_it(folder, stdlib_corpus, their_run, reference):
    saved = cut(their_run[0], 2)
    more = ["--load", str(saved), "--use-distributed-optimizer"]
    on = ours(folder, stdlib_corpus, "llama", *more)
    assert [row["iteration"] for row in on] == [3, 4]
    assert max(deviation(on, reference["llama"][2:])) < TOLERANCE


@pytest.mark.parametrize("optimizer", ["", "--use-distributed-optimizer"])
def test_it_goes_on_from_our_trainer(folder, stdlib_corpus, reference, optimizer):
    saved = folder / f"ours saved{optimizer}"
    weights = start_weights(folder, stdlib_corpus, "llama")
    words = f"--rope-scaling yarn --load {weights} --finetune {optimizer}"
    ours(
        folder, stdlib_corpus, "llama", *words.split(), "--save", str(saved), "--save-interval", "2"
    )
    layout = replace(LAYOUTS["TP2"], words=f"{LAYOUTS['TP2'].words} {optimizer}")
    more = ["--load", str(cut(saved, 2)), "--no-load-rng"]
    on = theirs(folder, stdlib_corpus, f"on {optimizer}", layout, *more)
    assert len(on) == STEPS - 2
    assert max(deviation(on, reference["llama"][2:])) < TOLERANCE


def test_its_checkpoint_leaves_for_hugging_face(folder, their_run):
    out = folder / "hf"
    convert = [ROOT / "tools/checkpoint/convert.py", "--loader", "megatron"]
    # It compares the logits with those of transformers' own model.
    said = launch([*convert, "--saver", "hf", "--load-dir", their_run[0], "--save-dir", out])
    assert "transformers" in said
    config = json.loads((out / "config.json").read_text())
    rope = config.get("rope_parameters") or config["rope_scaling"]
    assert (rope["rope_type"], rope["factor"]) == ("yarn", 8.0)
    assert config["rms_norm_eps"] == 1e-6 and config["max_position_embeddings"] == 256


def test_it_validates_and_tests(folder, stdlib_corpus):
    weights = start_weights(folder, stdlib_corpus, "llama")
    words = f"{SAMPLES} {SCHEDULE} {MEGATRON} --norm-epsilon 1e-6 --data-path {stdlib_corpus} "
    words += f"--train-iters 2 --rope-scaling yarn --load {weights} --finetune "
    words += "--eval-iters 1 --eval-interval 2 --split 80,10,10"
    said = launch([ROOT / "examples/megatron/pretrain_gpt_pose.py", *words.split()])
    assert "validation loss at iteration 2" in said and "test set" in said
    corpus = re.escape(str(stdlib_corpus))
    line = rf"{corpus}, train: .* samples an epoch, 16 samples of this run, [\d.]+ epochs"
    assert len(re.findall(line, said)) == 1


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "--norm-epsilon 1e-05 contradicts the checkpoint"),
        (
            "--norm-epsilon 1e-6 --use-rope-scaling",
            "--use-rope-scaling contradicts PoSE: give --rope-scaling llama3 instead",
        ),
        (
            "--norm-epsilon 1e-6 --qk-layernorm",
            "--qk-layernorm True contradicts the checkpoint",
        ),
        (
            "--norm-epsilon 1e-6 --rope-scaling yarn --fused-rotary on",
            "--fused-rotary on: torch finds no CUDA device, and Triton compiles for GPUs only",
        ),
        ("--norm-epsilon 1e-6", "256 is beyond the checkpoint's 32: choose a --rope-scaling"),
    ],
)
def test_mistakes_end_in_one_sentence(folder, stdlib_corpus, words, message):
    weights = start_weights(folder, stdlib_corpus, "llama")
    flags = f"{SAMPLES} {SCHEDULE} {MEGATRON} --data-path {stdlib_corpus} --train-iters 2 "
    flags += f"--load {weights} --finetune {words}"
    program = ROOT / "examples/megatron/pretrain_gpt_pose.py"
    done = subprocess.run(
        [sys.executable, str(program), *flags.split()],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (sentence,) = (line for line in done.stderr.splitlines() if "error:" in line)
    assert message in sentence


def test_a_dead_writer_ends_the_run(folder, stdlib_corpus, tmp_path):
    """Without a GPU, Megatron's persistent writer fails at once; Megatron itself would wait for it for
    ever."""
    weights = start_weights(folder, stdlib_corpus, "llama")
    flags = f"{SAMPLES} {SCHEDULE} {MEGATRON} --data-path {stdlib_corpus} --train-iters 2 "
    flags += f"--load {weights} --finetune --norm-epsilon 1e-6 --rope-scaling yarn --async-save "
    flags += (
        f"--use-persistent-ckpt-worker --async-strategy mcore --save {tmp_path} --save-interval 1"
    )
    program = ROOT / "examples/megatron/pretrain_gpt_pose.py"
    done = subprocess.run(
        [sys.executable, str(program), *flags.split()],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1, (done.stdout + done.stderr)[-4000:]
    (sentence,) = (line for line in done.stderr.splitlines() if "error:" in line)
    assert "the process that writes this rank's checkpoints ended with code" in sentence
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()
