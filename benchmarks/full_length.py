"""Time and peak memory of a step: PoSE on L tokens against full-length training on T = 2L, 4L, ...

The same model, one sample a step; each target runs in its own process, so that its peak memory is
its own (the paper's Figure 3). "pose" trains on L tokens with positions up to T.
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
    --num-layers 4 --num-attention-heads 8 --vocab-size 4096 --hidden-size {width}
    --seq-length {window} --max-position-embeddings {target} --rope-scaling linear
    --rope-scaling-factor {factor} --train-iters 1000000 --untie-embeddings-and-output-weights
    --split 100,0,0 --num-workers 0 --lr 1e-4"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python benchmarks/full_length.py --seq-length 256 --factors 2 4 8 16",
    )
    parser.add_argument("--hidden-size", type=int, default=512, help="[512]")
    parser.add_argument("--seq-length", type=int, default=256, help="PoSE's window L [256]")
    parser.add_argument("--factors", type=int, nargs="+", default=[2, 4, 8, 16], help="[2 4 8 16]")
    parser.add_argument("--steps", type=int, default=3, help="after one that warms up [3]")
    parser.add_argument("--extra", default="", help="more flags of pretrain_pose.py")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    parser.add_argument("--window", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--factor", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows:
        work(args)
        return
    length = args.seq_length
    results = []
    for kind, window, factor in [
        *(("pose", length, f) for f in args.factors),
        *(("full", length * f, f) for f in args.factors),
    ]:
        words = [
            f"--{name}={value}"
            for name, value in (
                ("hidden-size", args.hidden_size),
                ("seq-length", length),
                ("window", window),
                ("factor", factor),
                ("steps", args.steps),
                ("extra", args.extra),
            )
        ]
        (row,) = trainers.launch(__file__, words)
        results.append({"kind": kind, "window": window, "target": factor * length, **row})
    print_table(args, results)
    if args.output:
        settings = {
            k: v for k, v in vars(args).items() if k not in ("output", "rows", "window", "factor")
        }
        args.output.write_text(
            json.dumps({**trainers.machine(), "settings": settings, "results": results}, indent=1)
            + "\n"
        )


def work(args: argparse.Namespace) -> None:
    """One length, in this process."""
    target = args.seq_length * args.factor
    words = WORDS.format(
        width=args.hidden_size, window=args.window, target=target, factor=args.factor
    ).split()
    with tempfile.TemporaryDirectory() as folder:
        corpus = trainers.random_corpus(Path(folder), 4096, 2 * target + 1, documents=8)
        run = trainers.Run([*words, "--data-path", corpus, *args.extra.split()])
        before, seconds = peak_memory(), []
        for _ in range(args.steps + 1):
            trainers.synchronize()
            start = time.perf_counter()
            run.step()
            trainers.synchronize()
            seconds.append(time.perf_counter() - start)
    trainers.report(
        args.rows,
        seconds=statistics.median(seconds[1:]),
        steps=seconds[1:],
        bytes=peak_memory(),
        bytes_before_steps=before,
    )


def print_table(args: argparse.Namespace, results: list[dict]) -> None:
    print(
        f"{args.hidden_size} wide, one sample a step, medians of {args.steps} steps; "
        f"{trainers.machine()['device']}\n"
    )
    print(
        "| training | tokens a step | positions up to | s a step | times PoSE | peak MiB | "
        "of these in steps |\n|---|---:|---:|---:|---:|---:|---:|"
    )
    base = {r["target"]: r["seconds"] for r in results if r["kind"] == "pose"}
    for r in results:
        name = "PoSE" if r["kind"] == "pose" else "full length"
        steps = (r["bytes"] - r["bytes_before_steps"]) / 2**20
        print(
            f"| {name} | {r['window']} | {r['target']} | {r['seconds']:.3f} | "
            f"{r['seconds'] / base[r['target']]:.1f} | {r['bytes'] / 2**20:.0f} | {steps:.0f} |"
        )


if __name__ == "__main__":
    main()
