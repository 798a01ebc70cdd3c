"""pretrain_pose.py as a user starts it: the same losses in every layout, exact resumption, and one
sentence for each mistake."""

import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
# Per-sample positions far beyond the window, two samples in a micro-batch, two micro-batches.
COMMON = """
    --seq-length 32 --micro-batch-size 2 --global-batch-size 4 --split 90,10,0 --num-workers 0
    --lr 1e-2 --lr-warmup-iters 1 --lr-decay-iters 8 --clip-grad 0.5 --pose-num-chunks 3
    --log-interval 1 --eval-interval 2 --eval-iters 2""".split()
SHAPES = {
    "grouped, untied, yarn": """
        --num-layers 4 --hidden-size 64 --num-attention-heads 4 --group-query-attention
        --num-query-groups 2 --untie-embeddings-and-output-weights --vocab-size 257
        --max-position-embeddings 256 --rope-scaling yarn --init-method-std 0.1""".split(),
    "multi-head, tied, linear": """
        --num-layers 2 --hidden-size 64 --num-attention-heads 4 --vocab-size 257
        --max-position-embeddings 256 --rope-scaling linear --init-method-std 0.1""".split(),
}
GROUPED, TIED = SHAPES
LAYOUTS = {
    "TP2": "--tensor-model-parallel-size 2",
    "TP2 SP": "--tensor-model-parallel-size 2 --sequence-parallel",
    "PP2": "--pipeline-model-parallel-size 2",
    "PP2 VPP2": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    "CP2": "--context-parallel-size 2",
    "DP2": "",
    "DP2 distributed optimizer": "--use-distributed-optimizer",
}


def launch(ranks: int, words: list[str]) -> subprocess.CompletedProcess:
    """Plain python for one rank, torchrun for several."""
    program = [str(ROOT / "pretrain_pose.py"), *words]
    if ranks > 1:
        program = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            *program,
        ]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *program],
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


class Runs:
    """Runs, each started once, by a name; the log of each as {iteration: values}."""

    def __init__(self, folder: Path, corpus: str):
        self.folder, self.corpus, self.done = folder, corpus, {}

    def __call__(self, name: str, ranks: int, words: list[str]) -> dict[int, dict]:
        if name not in self.done:
            log = self.folder / f"{name}.jsonl"
            run = launch(
                ranks, [*COMMON, "--data-path", self.corpus, "--log-file", str(log), *words]
            )
            assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
            steps = {}
            for line in log.read_text().splitlines():
                values = json.loads(line)
                steps.setdefault(values["iteration"], {}).update(values)
            self.done[name] = steps, run
        return self.done[name][0]

    def checkpoint(self, shape: str) -> str:
        """Fresh weights trained for 4 steps on one rank, with a save after 2 of them."""
        path = str(self.folder / shape)
        self(
            f"fresh {shape}",
            1,
            [*SHAPES[shape], "--train-iters", "4", "--save", path, "--save-interval", "2"],
        )
        return path

    def finetuned(self, shape: str, layout: str | None) -> dict[int, dict]:
        """Four steps from that checkpoint: on one rank, or in a layout of two."""
        name = f"{shape} on {layout}"
        words = [
            "--load",
            self.checkpoint(shape),
            "--finetune",
            "--train-iters",
            "4",
            "--save",
            str(self.folder / name),
            "--save-interval",
            "2",
        ]
        if layout is None:
            return self(name, 1, words)
        return self(name, 2, [*words, *LAYOUTS[layout].split()])

    def resumed(self, name: str, folder: str, ranks: int, words: list[str]) -> dict[int, dict]:
        """Steps 3 and 4 of the run that saved into `folder`, started again from step 2."""
        tracker = Path(folder) / "latest_checkpointed_iteration.txt"
        assert tracker.read_text() == "4"
        tracker.write_text("2")
        try:
            return self(name, ranks, ["--load", folder, "--train-iters", "4", *words])
        finally:
            tracker.write_text("4")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, stdlib_corpus):
    runs = Runs(tmp_path_factory.mktemp("runs"), stdlib_corpus)
    with ThreadPoolExecutor(2) as pool:  # one rank leaves a core idle: the two shapes together
        list(pool.map(runs.checkpoint, SHAPES))
        list(pool.map(lambda shape: runs.finetuned(shape, None), SHAPES))
    return runs


EXACT = ("loss", "grad_norm", "lr", "valid_loss", "consumed_samples")


def same(one: dict, other: dict, rel: float) -> None:
    assert set(one) == set(other)
    for step in one:
        for name in EXACT:
            assert (name in one[step]) == (name in other[step]), (step, name)
            if name in one[step]:
                assert one[step][name] == pytest.approx(other[step][name], rel=rel), (step, name)


@pytest.mark.parametrize(
    "shape, layout",
    [
        (GROUPED, "TP2 SP"),
        (GROUPED, "PP2"),
        (GROUPED, "PP2 VPP2"),
        (GROUPED, "CP2"),
        (GROUPED, "DP2 distributed optimizer"),
        (TIED, "TP2"),
        (TIED, "DP2"),
    ],
)
def test_two_ranks_give_the_losses_and_gradients_of_one(runs, shape, layout):
    alone = runs.finetuned(shape, None)
    assert sorted(alone) == [1, 2, 3, 4] and {"valid_loss"} <= set(alone[2]) & set(alone[4])
    assert alone[4]["loss"] != alone[1]["loss"]
    same(runs.finetuned(shape, layout), alone, rel=1e-5)


@pytest.mark.parametrize("shape, layout", [(GROUPED, "TP2"), (TIED, "PP2")])
def test_fresh_weights_are_those_of_one_rank(runs, shape, layout):
    runs.checkpoint(shape)
    alone = runs(f"fresh {shape}", 1, [])
    words = [*SHAPES[shape], *LAYOUTS[layout].split(), "--train-iters", "4"]
    same(runs(f"fresh {shape} on {layout}", 2, words), alone, rel=1e-5)


def test_a_resumed_run_repeats_the_straight_one_exactly(runs):
    folder = runs.checkpoint(GROUPED)
    straight = runs(f"fresh {GROUPED}", 1, [])
    resumed = runs.resumed("resumed", folder, 1, [])
    same(resumed, {step: straight[step] for step in (3, 4)}, rel=0)


def test_a_resumed_distributed_optimizer_repeats_the_straight_run_exactly(runs):
    layout = "DP2 distributed optimizer"
    straight = runs.finetuned(GROUPED, layout)
    folder = str(runs.folder / f"{GROUPED} on {layout}")
    resumed = runs.resumed("resumed distributed", folder, 2, LAYOUTS[layout].split())
    same(resumed, {step: straight[step] for step in (3, 4)}, rel=0)


def test_bf16_trains_like_float32_and_resumes_exactly(runs):
    folder = str(runs.folder / "bf16")
    straight = runs(
        "bf16",
        1,
        [*SHAPES[TIED], "--bf16", "--train-iters", "4", "--save", folder, "--save-interval", "2"],
    )
    runs.checkpoint(TIED)
    exact = runs(f"fresh {TIED}", 1, [])
    for step in straight:
        assert straight[step]["loss"] == pytest.approx(exact[step]["loss"], rel=0.02)
        assert straight[step]["loss"] != exact[step]["loss"]
    resumed = runs.resumed("bf16 resumed", folder, 1, ["--bf16"])
    same(resumed, {step: straight[step] for step in (3, 4)}, rel=0)


def test_the_log_says_what_happened_and_rank_0_says_it_alone(runs):
    runs.finetuned(TIED, "TP2")
    steps, run = runs.done[f"{TIED} on TP2"]
    for i in range(1, 5):
        assert run.stdout.count(f"iteration {i}/4 |") == 1
        assert steps[i]["consumed_samples"] == 4 * i
        assert math.isfinite(steps[i]["loss"]) and steps[i]["grad_norm"] > 0
        assert steps[i]["tokens_per_second_per_rank"] > 0
    # 257 tokens, nearly uniform at first: the loss of a fresh model is near ln 257 = 5.55.
    runs.checkpoint(TIED)
    assert 5 < runs(f"fresh {TIED}", 1, [])[1]["loss"] < 8
    # Warm-up of one step from 0, then a cosine of 8 steps: half of the rest at its middle.
    assert steps[1]["lr"] == 0 and steps[2]["lr"] == pytest.approx(1e-2)
    assert steps[4]["lr"] == pytest.approx(1e-2 * (1 + math.cos(math.pi * 2 / 7)) / 2)
    assert "tensor 2 x pipeline 1" in run.stdout and "Traceback" not in run.stderr


# Mistakes: what is said, by which words, on how many ranks.

MISTAKES = {
    "a missing corpus": (
        1,
        "--data-path {folder}/nowhere",
        ["--data-path {folder}/nowhere", "{folder}/nowhere.idx is missing"],
    ),
    "a truncated corpus": (
        1,
        "--data-path {folder}/truncated",
        ["{folder}/truncated.idx is truncated"],
    ),
    "an unknown flag": (1, "--sequence-length 3", ["--sequence-length"]),
    "a window beyond the target": (
        1,
        "--seq-length 512",
        ["--seq-length 512", "--max-position-embeddings 256"],
    ),
    "a checkpoint that contradicts the flags": (
        1,
        "--load {tied} --finetune --num-layers 5",
        ["--num-layers 5 contradicts the checkpoint, which has 2"],
    ),
    "a damaged checkpoint": (
        1,
        "--load {folder}/damaged --finetune",
        ["iter_0000004 cannot be loaded"],
    ),
    "a mistake met in a loader process": (
        1,
        "--num-workers 1 --vocab-size 100",
        ["--data-path", "outside the vocabulary of 100"],
    ),
    "ranks that the layout does not divide": (
        2,
        "--tensor-model-parallel-size 4",
        ["2 ranks", "--tensor-model-parallel-size 4", "multiple of 4"],
    ),
    "weights that overflow, found by both pipeline stages": (
        2,
        "--pipeline-model-parallel-size 2 --lr 1e30 --train-iters 9 --max-skipped-iterations 2",
        ["2 steps in a row had a loss or gradient that is not finite", "the last at 4"],
    ),
    "a vocabulary too small, met by rank 0 while rank 1 waits for it": (
        2,
        "--tensor-model-parallel-size 2 --vocab-size 100",
        ["outside the vocabulary of 100"],
    ),
}


@pytest.fixture(scope="module")
def refusals(runs):
    """What each mistake ended in; the machine has work for two at a time."""
    folder, tied = runs.folder, runs.checkpoint(TIED)
    for ending in ("bin", "idx"):
        content = Path(f"{runs.corpus}.{ending}").read_bytes()
        (folder / f"truncated.{ending}").write_bytes(content[: 100 if ending == "idx" else None])
    for shard in (shutil.copytree(tied, folder / "damaged") / "iter_0000004").glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:1000])

    def start(mistake):
        ranks, words, _ = MISTAKES[mistake]
        return launch(
            ranks,
            [
                *COMMON,
                *SHAPES[TIED],
                "--data-path",
                runs.corpus,
                "--train-iters",
                "2",
                *(w.format(folder=folder, tied=tied) for w in words.split()),
            ],
        )

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(MISTAKES, pool.map(start, MISTAKES), strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_one_sentence(runs, refusals, mistake):
    run, (ranks, _, expected) = refusals[mistake], MISTAKES[mistake]
    output = run.stdout + run.stderr
    assert run.returncode != 0, output
    sentences = [line for line in output.splitlines() if "pretrain_pose.py: error:" in line]
    assert len(sentences) == 1, output
    for words in expected:
        assert words.format(folder=runs.folder) in sentences[0]
    assert 'pretrain_pose.py", line' not in output, output
    if ranks == 1:  # of several, torchrun reports the failed one in its own words
        assert run.stderr.strip().splitlines()[-1] == sentences[0], run.stderr
        assert "Traceback" not in output and "Exception ignored" not in output, output


def test_a_dry_run_needs_no_data_and_leaves_nothing(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "num-layers: 2\nhidden-size: 64\nnum-attention-heads: 4\nvocab-size: 257\n"
        "seq-length: 128\nmax-position-embeddings: 1024\nrope-scaling: yarn\n"
    )
    before = sorted(tmp_path.rglob("*"))
    run = launch(1, ["--config", str(config), "--dry-run", "--save", str(tmp_path / "out")])
    assert run.returncode == 0, run.stderr
    assert sorted(tmp_path.rglob("*")) == before
    # 2 layers of 4 h^2 attention, 3 h 128 feed-forward and two norms; one table; a last norm.
    count = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 384 * 64 + 64
    for words in (
        f"{count:,} parameters",
        "yarn x8",
        "window L = 128, target T = 1024",
        "tensor 1 x pipeline 1",
        "sample 0:",
        "sample 2:",
    ):
        assert words in run.stdout, run.stdout
