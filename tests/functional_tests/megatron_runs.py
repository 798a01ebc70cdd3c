"""Trains the same weights on the same batches in Megatron's own pretrain() and in our trainer.

    python tests/functional_tests/megatron_runs.py          all layouts, as a Markdown table

Under torchrun it is the program that one layout runs: pose_megatron.megatron's run(), which notes
the loss and gradient norm of every step in full (Megatron logs six digits, and at its second step
the mean of two). Needs megatron-core 0.19.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
SCHEDULE = """--lr 3e-3 --lr-warmup-iters 1 --lr-decay-iters 8 --lr-decay-style cosine
    --clip-grad 0.5 --weight-decay 0.01 --adam-beta1 0.9 --adam-beta2 0.95"""
SAMPLES = """--seq-length 32 --max-position-embeddings 256 --pose-num-chunks 3 --split 100,0,0
    --micro-batch-size 2 --global-batch-size 8 --num-workers 0 --seed 1234"""
SHAPE = """--num-layers 4 --hidden-size 64 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --untie-embeddings-and-output-weights --vocab-size 257
    --norm-epsilon 1e-6 --init-method-std 0.2"""
MODELS = {  # ours, and what --use-checkpoint-args does not take from a checkpoint
    "llama": (SHAPE, "--norm-epsilon 1e-6"),
    "experts": (
        f"{SHAPE} --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --qk-layernorm",
        "--norm-epsilon 1e-6 --qk-layernorm --moe-token-dispatcher-type allgather "
        "--moe-router-load-balancing-type none",
    ),
}
# The vocabulary's size in Megatron's tokenizer, which adds a token of its own.
MEGATRON = """--use-checkpoint-args --tokenizer-type NullTokenizer --vocab-size 256
    --calculate-per-token-loss --eval-iters 0 --eval-interval 100 --log-interval 1"""
TP, PP, CP = (f"--{name}-parallel-size" for name in ("tensor-model", "pipeline-model", "context"))

# From a GPTModel's checkpoint, Megatron takes the optimizer's state, too, unless told not to.
HYBRID = "--no-load-optim --hybrid-layer-pattern"


@dataclass(frozen=True)
class Layout:
    ranks: int
    words: str = ""
    model: str = "llama"
    stock: bool = False  # megatron-core's own rotary embedding, which ignores position ids


LAYOUTS = {
    "1 rank": Layout(1),
    "1 rank, full recompute": Layout(
        1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    ),
    "TP2": Layout(2, f"{TP} 2"),
    "TP2 SP": Layout(2, f"{TP} 2 --sequence-parallel"),
    "PP2": Layout(2, f"{PP} 2"),
    "PP2 VPP2": Layout(2, f"{PP} 2 --num-layers-per-virtual-pipeline-stage 1"),
    "PP4": Layout(4, f"{PP} 4"),
    "CP2": Layout(2, f"{CP} 2"),
    "DP2, distributed optimizer, overlapped": Layout(
        2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    ),
    "Hybrid": Layout(1, f"{HYBRID} *-*-*-*-"),
    "Hybrid, PP2": Layout(2, f"{PP} 2 {HYBRID} *-*-|*-*-"),
    "experts": Layout(1, model="experts"),
    "experts, EP2": Layout(2, "--expert-model-parallel-size 2", "experts"),
}
STOCK = {"1 rank, stock rotary embedding": Layout(1, stock=True)}


def start_weights(folder: Path, corpus: str, model: str) -> Path:
    """A checkpoint of fresh weights with a window of 32 tokens, saved by our trainer."""
    weights = folder / model
    if not weights.exists():
        words = f"{MODELS[model][0]} {SAMPLES} --data-path {corpus} --seed 5 --train-iters 1 --lr 0"
        # Its window is the samples', so that the runs really interpolate, by 8.
        words += " --max-position-embeddings 32"
        launch([ROOT / "pretrain_pose.py", *words.split(), "--save", weights])
    return weights


def ours(folder: Path, corpus: str, model: str, *more: str) -> list[dict]:
    """Steps of our own trainer on one rank: its log, one dict each."""
    log = folder / f"ours-{model}-{len(more)}.jsonl"
    words = f"{SAMPLES} {SCHEDULE} --data-path {corpus} --train-iters {STEPS} --log-interval 1"
    if "--load" not in more:
        words += f" --rope-scaling yarn --load {start_weights(folder, corpus, model)} --finetune"
    launch([ROOT / "pretrain_pose.py", *words.split(), "--log-file", log, *more])
    return [json.loads(line) for line in log.read_text().splitlines()]


def theirs(folder: Path, corpus: str, name: str, layout: Layout, *more: str) -> list[dict]:
    """Steps of Megatron's pretrain() with PoSE: {"loss", "grad_norm"} of each."""
    note = folder / f"{name}.jsonl"
    words = f"{SAMPLES} {SCHEDULE} {MEGATRON} {MODELS[layout.model][1]} {layout.words} "
    words += f"--data-path {corpus} --train-iters {STEPS} "
    if "--load" not in more:
        weights = start_weights(folder, corpus, layout.model)
        words += f"--rope-scaling yarn --load {weights} --finetune"
    launch(
        [Path(__file__), "--note", note, *["--stock"] * layout.stock, *words.split(), *more],
        layout.ranks,
    )
    return [json.loads(line) for line in note.read_text().splitlines()]


def launch(command: list, ranks: int = 1) -> str:
    """Runs a program on so many ranks; its output. An AssertionError shows the end of it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    torchrun *= ranks > 1
    done = subprocess.run(
        [str(word) for word in (sys.executable, *torchrun, *command)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(_path())},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def _path() -> list[str]:
    return [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def deviation(found: list[dict], wanted: list[dict]) -> tuple[float, float]:
    """The largest relative differences of losses and of gradient norms."""
    assert len(found) == len(wanted)
    pairs = list(zip(found, wanted, strict=True))
    return (
        max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs),
        max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in pairs),
    )


def run_and_note() -> int:
    """The program of one rank."""
    from pose_megatron.megatron import prepare, run
    from pose_megatron.runtime.cli import command

    own = argparse.ArgumentParser(allow_abbrev=False)
    own.add_argument("--note", type=Path)
    own.add_argument("--stock", action="store_true")
    options, sys.argv[1:] = own.parse_known_args()

    @command
    def main() -> None:
        prepare()
        from megatron.training import training

        from pose_megatron.megatron import model

        if options.stock:
            model._install = lambda rope, fused, chunks: chunks
        step = training.train_step

        def noted(*args, **kwargs):
            done = step(*args, **kwargs)
            losses, norm = done[0], done[5]
            # The last stage knows the loss; its ranks agree.
            if losses and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
                row = {"loss": float(losses["lm loss"]), "grad_norm": float(norm)}
                with open(options.note, "a") as file:
                    file.write(json.dumps(row) + "\n")
            return done

        training.train_step = noted
        run()

    return main()


def table() -> str:
    """All layouts against our trainer on one rank, as Markdown."""
    from tests.functional_tests.layouts import stdlib_corpus

    lines = [
        f"| layout and model in `pretrain()` | loss of step {STEPS} "
        "| largest relative difference: loss | gradient norm |",
        "|---|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = stdlib_corpus(name)
        reference = {model: ours(folder, corpus, model) for model in MODELS}
        for model, rows in reference.items():
            lines.append(f"| our trainer, 1 rank, {model} | {rows[-1]['loss']:.6f} | | |")
        for layout_name, layout in (LAYOUTS | STOCK).items():
            rows = theirs(folder, corpus, layout_name, layout)
            loss, norm = deviation(rows, reference[layout.model])
            last = rows[-1]["loss"]
            lines.append(f"| {layout_name} | {last:.6f} | {loss:.1e} | {norm:.1e} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    if "--note" in sys.argv:
        sys.exit(run_and_note())
    sys.path.insert(0, str(ROOT))
    print(table())
