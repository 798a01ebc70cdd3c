"""Seconds that a save costs a run, in the foreground and in the background, and a resume's seconds.

Baselines, in the same run: torch.save of the same weights and optimizer state, with an fsync, and
torch.load of that file. A save in the background costs the time of the call itself, and slows the
steps after it; both are counted, by timing a fixed number of steps with and without it.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import trainers

from pose_megatron.checkpoints.checksums import checksums
from pose_megatron.checkpoints.megatron.directory import find
from pose_megatron.training.checkpointing import SaveQueue, load
from pose_megatron.training.trainer import save

WORDS = """
    --num-layers {layers} --num-attention-heads 8 --vocab-size 4096 --hidden-size {width}
    --seq-length 64 --max-position-embeddings 1024 --rope-scaling linear --train-iters 1000000
    --untie-embeddings-and-output-weights --split 100,0,0 --num-workers 0 --lr 1e-4"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python benchmarks/resume.py --repeats 5",
    )
    parser.add_argument("--hidden-size", type=int, default=512, help="[512]")
    parser.add_argument("--num-layers", type=int, default=8, help="[8]")
    parser.add_argument("--repeats", type=int, default=5, help="[5]")
    parser.add_argument(
        "--steps", type=int, default=20, help="to run during a background save [20]"
    )
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows:
        work(args)
        return
    words = [
        f"--{name.replace('_', '-')}={getattr(args, name)}"
        for name in ("hidden_size", "num_layers", "repeats", "steps")
    ]
    (row,) = trainers.launch(__file__, words)
    print_table(row)
    if args.output:
        args.output.write_text(json.dumps({**trainers.machine(), **row}, indent=1) + "\n")


def work(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as name:
        folder = Path(name)
        words = WORDS.format(width=args.hidden_size, layers=args.num_layers).split()
        words += ["--data-path", trainers.random_corpus(folder, 4096, 4097)]
        run = trainers.Run([*words, "--save", str(folder / "checkpoints")])
        run.step()  # the optimizer has its state
        measures = {
            name: []
            for name in (
                "torch_save",
                "save",
                "background_call",
                "background_cost",
                "torch_load",
                "resume",
                "load",
                "load_with_checksums",
            )
        }
        seconds_of_step = statistics.median(timed(run.step) for _ in range(10))
        for _ in range(args.repeats):
            measures["torch_save"].append(timed(lambda: torch_save(run, folder / "plain.pt")))
            measures["torch_load"].append(timed(lambda: torch.load(folder / "plain.pt")))
            measures["save"].append(timed(lambda: save(run.trainer)))
            call, cost = background(run, args.steps)
            measures["background_call"].append(call)
            measures["background_cost"].append(cost)
        resumed = [*words, "--load", str(folder / "checkpoints")]
        for _ in range(args.repeats):
            fresh = timed(lambda: trainers.Run(words))
            measures["resume"].append(timed(lambda: trainers.Run(resumed)) - fresh)
        found = find(folder / "checkpoints")
        trainer = run.trainer
        into = trainer.stages, trainer.optimizer, trainer.scheduler
        for _ in range(args.repeats):
            for name, on in (("load", False), ("load_with_checksums", True)):
                with checksums(on):
                    measures[name].append(timed(lambda: load(found, *into)))
        size = (folder / "plain.pt").stat().st_size
        shutil.rmtree(folder / "checkpoints")
    trainers.report(
        args.rows,
        bytes=size,
        seconds_of_step=seconds_of_step,
        steps=args.steps,
        **{name: statistics.median(values) for name, values in measures.items()},
    )


def background(run: trainers.Run, steps: int) -> tuple[float, float]:
    """(seconds of the call, seconds by which a background save lengthens this many steps)."""
    alone = timed(lambda: [run.step() for _ in range(steps)])
    queue = SaveQueue()
    start = time.perf_counter()
    save(run.trainer, queue)
    call = time.perf_counter() - start
    for _ in range(steps):
        run.step()
        queue.maybe_finalize_async_calls()
    queue.maybe_finalize_async_calls(blocking=True)
    return call, time.perf_counter() - start - alone


def torch_save(run: trainers.Run, path: Path) -> None:
    trainer = run.trainer
    state = [stage.state_dict() for stage in trainer.stages], trainer.optimizer.state_dict()
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def timed(action: Callable[[], object]) -> float:
    trainers.synchronize()
    start = time.perf_counter()
    action()
    trainers.synchronize()
    return time.perf_counter() - start


def print_table(row: dict) -> None:
    print(
        f"{row['bytes'] / 1e6:.0f} MB of weights and optimizer state, steps of "
        f"{row['seconds_of_step']:.3f} s; {trainers.machine()['device']}\n"
    )
    print("| | seconds | times torch.save, torch.load or load |\n|---|---:|---:|")
    for name, label, base in (
        ("torch_save", "torch.save, with fsync", "torch_save"),
        ("save", "save", "torch_save"),
        ("background_call", "save in the background: the call", "torch_save"),
        (
            "background_cost",
            f"save in the background: in all, over {row['steps']} steps",
            "torch_save",
        ),
        ("torch_load", "torch.load", "torch_load"),
        ("resume", "resume, beyond a fresh start", "torch_load"),
        ("load", "load, without checksums", "load"),
        ("load_with_checksums", "load, with checksums", "load"),
    ):
        print(f"| {label} | {row[name]:.3f} | {row[name] / row[base]:.2f} |")


if __name__ == "__main__":
    main()
