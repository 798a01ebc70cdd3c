"""What one GPU does, in one command: our kernels, steps, full length, and long evaluation.

    python benchmarks/gpu/run.py --output gpu.json

Takes 8 minutes; what does not fit a smaller GPU than an H200 is said in its row. Each part runs in
a process of its own and is written as soon as it is there, so that one that fails costs no other;
the exit code then is 1.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

PARTS = ("kernels", "steps", "full_length", "evaluation")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="[gpu.json]")
    parser.add_argument("--here", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        work(args.here, args.dry, args.output)
        return 0
    results: dict = {"parts": {}}
    for part in args.only:
        print(f"== {part}", flush=True)
        start = time.perf_counter()
        machine, found = in_a_process_of_its_own(part, args.dry)
        results = {**machine, **results}
        results["parts"][part] = {"took": time.perf_counter() - start, **found}
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    return int(any("error" in part for part in results["parts"].values()))


def in_a_process_of_its_own(part: str, dry: bool) -> tuple[dict, dict]:
    """(the machine, {"rows": ...} with "error" where it ended early)."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.jsonl"
        words = ["--here", part, "--output", str(output), *(["--dry"] if dry else [])]
        done = subprocess.run([sys.executable, __file__, *words], stderr=subprocess.PIPE, text=True)
        written = output.read_text().splitlines() if output.exists() else []
    machine, *rows = [json.loads(line) for line in written] or [{}]
    if done.returncode == 0:
        return machine, {"rows": rows}
    print(done.stderr[-4000:], file=sys.stderr)
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return machine, {"rows": rows, "error": said[-1]}


def work(part: str, dry: bool, output: Path) -> None:
    """One part in this process; its rows go into the file as they come."""
    import trainers  # prepares megatron-core

    # isort: split
    import evaluation
    import kernels
    import steps
    import torch
    from shapes import FULL, TINY

    if not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use")
    rows = {
        "kernels": kernels.rows,
        "steps": steps.rows,
        "full_length": steps.full_length,
        "evaluation": evaluation.rows,
    }[part]
    with output.open("w") as file:
        print(json.dumps(trainers.machine()), file=file, flush=True)
        for row in rows(TINY if dry else FULL):
            print(json.dumps(row), flush=True)
            print(json.dumps(row), file=file, flush=True)


if __name__ == "__main__":
    sys.exit(main())
