"""What the benchmarks of Triton kernels share: their tables, and what a compiled kernel takes."""

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ARCHITECTURES = (80, 90, 100)


def main(program: str, description: str, parts: dict[str, tuple[Callable, Callable]]) -> None:
    """Runs a benchmark.

    Args:
        program: its file.
        parts: {table: (what returns its rows, what prints them)}; `errors` are interpreted where
            there is no GPU.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=parts, help="one table")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--here", choices=parts, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(parts[args.here][0]()))
        return
    if importlib.util.find_spec("triton") is None:
        print("No Triton here, so no figures: pip install triton -c constraints.txt")
        return
    results = {}
    for name, (_, show) in parts.items():
        if args.only in (None, name):
            results[name] = in_a_process_of_its_own(program, name)
            show(results[name])
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


def in_a_process_of_its_own(program: str, part: str):
    """Triton decides as it is imported whether it interprets or compiles."""
    import torch

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if part == "errors" and not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, program, "--here", part], env=environment, stdout=subprocess.PIPE
    )
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def resources(
    kernel, kinds: dict[str, str], fixed: dict, whole: set[str], architecture: int, **options
) -> dict[str, int]:
    """{registers of a thread, bytes of stack and local memory of a thread} of a compiled kernel.

    Args:
        kinds: {argument: Triton's type}; those that are missing are i32.
        fixed: {argument: its value}, of those that are known when it is compiled.
        whole: arguments that 16 divides, as Triton would find at a launch.
        options: Triton's, such as num_warps.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    kinds = dict.fromkeys(names, "i32") | kinds | dict.fromkeys(fixed, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: kinds[name] for name in names},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in whole},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed)
    used, stack, local = map(int, found)
    return {"registers": used, "spilled": stack + local}


def show_registers(rows: list[dict]) -> None:
    """Rows of shape, backward, architecture and `resources`; all architectures of one together."""
    print("\nRegisters of a thread; bytes that it spills\n")
    print("| | pass |", *(f"sm_{architecture} |" for architecture in ARCHITECTURES), "spilled |")
    print("|---|---|" + "---:|" * (len(ARCHITECTURES) + 1))
    for start in range(0, len(rows), len(ARCHITECTURES)):
        alike = rows[start : start + len(ARCHITECTURES)]
        way = "backward" if alike[0]["backward"] else "forward"
        cells = [*(row["registers"] for row in alike), sum(row["spilled"] for row in alike)]
        print(f"| {alike[0]['shape']} | {way} |", *(f"{cell} |" for cell in cells))


def timed(ways: dict[str, Callable], calls: int = 20, rounds: int = 7) -> list[dict]:
    """The time of each call, in milliseconds.

    Args:
        ways: {how: what to call}; it works on the current device's stream.

    Returns:
        Rows of how, `ms` on the device, where a call's kernels follow each other without waiting
        for the host, and `call_ms`, from one call to the next; medians of rounds of calls.
    """
    import torch

    rows = []
    for how, way in ways.items():
        device, host = [], []
        for _ in range(rounds):
            way()
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                way()
            torch.cuda.synchronize()
            host.append(1e3 * (time.perf_counter() - start) / calls)
            # Half as long again as the host needs to launch them all.
            torch.cuda._sleep(int(3e6 * host[-1] * calls))
            before.record()
            for _ in range(calls):
                way()
            after.record()
            torch.cuda.synchronize()
            device.append(before.elapsed_time(after) / calls)
        ms, call_ms = (statistics.median(found) for found in (device, host))
        rows.append({"how": how, "ms": ms, "call_ms": call_ms})
    return rows


def show_times(rows: list[dict], what: str) -> None:
    """Rows of how, ms and call_ms, one of them `a copy`; `what` was measured."""
    import torch

    if not rows:
        print("\nNo GPU here: no times.")
        return
    print(f"\n{what}; {torch.cuda.get_device_name()}\n")
    print("| | on the device, ms | times a copy | a call, ms |\n|---|---:|---:|---:|")
    copy = next(row["ms"] for row in rows if row["how"] == "a copy")
    for row in rows:
        times_a_copy = row["ms"] / copy
        print(f"| {row['how']} | {row['ms']:.4f} | {times_a_copy:.2f} | {row['call_ms']:.3f} |")
