"""What skip-wise positions cost: a training step with them against one with megatron-core's stock
RoPE, in one process and in turn (A B A B ...).

Both run this project's trainer, with the same layers, optimizer and data path. "pose" draws
skip-wise positions for every sample and rotates by them; "stock" rotates by megatron-core's
RotaryEmbedding at 0, 1, 2, ... Peak memory is measured in processes that run only one of the two.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import trainers

from pose_megatron.training.log import peak_memory

WORDS = """
    --num-layers 4 --num-attention-heads 8 --vocab-size 4096 --max-position-embeddings {target}
    --hidden-size {width} --seq-length {window} --rope-scaling linear --train-iters 1000000
    --untie-embeddings-and-output-weights --split 100,0,0 --num-workers 0
    --micro-batch-size {micro} --global-batch-size {micro} --lr 1e-4"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python benchmarks/step_overhead.py --output step_overhead.json",
    )
    parser.add_argument("--hidden-size", type=int, default=512, help="[512]")
    parser.add_argument("--seq-length", type=int, default=512, help="window L [512]")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="[2]")
    parser.add_argument("--steps", type=int, default=30, help="steps of each of the two [30]")
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        nargs="+",
        default=[1, 2],
        metavar="N",
        help="sizes to measure, each with as many ranks [1 2]",
    )
    parser.add_argument("--extra", default="", help="more flags of pretrain_pose.py, for both")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("pose", "stock"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows:
        work(args)
        return
    results = []
    for size in args.tensor_parallel:
        words = [
            f"--{name}={value}"
            for name, value in (
                ("hidden-size", args.hidden_size),
                ("seq-length", args.seq_length),
                ("micro-batch-size", args.micro_batch_size),
                ("steps", args.steps),
                ("tensor-parallel", size),
                ("extra", args.extra),
            )
        ]
        (times,) = trainers.launch(__file__, words, size)
        for kind in ("pose", "stock"):
            (alone,) = trainers.launch(__file__, [*words, "--only", kind, "--steps", "3"], size)
            times[f"{kind}_bytes"] = alone["bytes"]
        results.append({"tensor_parallel": size, **times})
    print_table(args, results)
    if args.output:
        settings = {k: v for k, v in vars(args).items() if k not in ("output", "rows", "only")}
        args.output.write_text(
            json.dumps({**trainers.machine(), "settings": settings, "results": results}, indent=1)
            + "\n"
        )


def work(args: argparse.Namespace) -> None:
    """One process of the measurement."""
    with tempfile.TemporaryDirectory() as folder:
        window = args.seq_length
        words = WORDS.format(
            width=args.hidden_size, window=window, target=16 * window, micro=args.micro_batch_size
        ).split()
        words += [
            "--tensor-model-parallel-size",
            str(args.tensor_parallel[0]),
            "--data-path",
            trainers.random_corpus(Path(folder), 4096, 8 * window + 1),
            *args.extra.split(),
        ]
        kinds = [args.only] if args.only else ["pose", "stock"]
        runs = {kind: trainers.Run(words, stock=kind == "stock") for kind in kinds}
        seconds = {kind: [] for kind in kinds}
        for i in range(args.steps + 2):
            for kind in kinds if i % 2 else reversed(kinds):  # neither always comes first
                trainers.synchronize()
                start = time.perf_counter()
                runs[kind].step()
                trainers.synchronize()
                if i >= 2:  # the first ones warm up
                    seconds[kind].append(time.perf_counter() - start)
    row = {"bytes": peak_memory()}
    if not args.only:
        pairs = zip(seconds["pose"], seconds["stock"], strict=True)
        row = {f"{kind}_seconds": statistics.median(seconds[kind]) for kind in kinds}
        row["ratio"] = statistics.median(a / b for a, b in pairs)
    trainers.report(args.rows, **row)


def print_table(args: argparse.Namespace, results: list[dict]) -> None:
    print(
        f"{args.hidden_size} wide, window {args.seq_length}, {args.micro_batch_size} samples a "
        f"step, medians of {args.steps} steps; {trainers.machine()['device']}\n"
    )
    print(
        "| ranks (tensor parallel) | PoSE, s | stock RoPE, s | ratio of pairs | PoSE, MiB | "
        "stock, MiB |\n|---:|---:|---:|---:|---:|---:|"
    )
    for r in results:
        print(
            f"| {r['tensor_parallel']} | {r['pose_seconds']:.4f} | {r['stock_seconds']:.4f} | "
            f"{r['ratio']:.3f} | {r['pose_bytes'] / 2**20:.0f} | "
            f"{r['stock_bytes'] / 2**20:.0f} |"
        )


if __name__ == "__main__":
    main()
