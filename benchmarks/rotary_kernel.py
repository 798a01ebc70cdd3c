"""The fused rotary embedding: its errors, its registers and, on a GPU, its times.

    python benchmarks/rotary_kernel.py

Errors are the largest distance of (cos, sin) from float64's, over all pairs of a head of 128 and
the positions right below a limit and at random below it; without a GPU, Triton's interpreter
computes them. Registers are what ptxas gives the kernel, compiled here for each architecture, and
spills the bytes of stack and local memory; no GPU is needed. Times are medians of forward plus
backward pass: the kernel, a copy of as many bytes, megatron-core's unfused path on the same angles
and, where it can be imported, Transformer Engine's kernel, which takes one row of positions for all
samples. Needs Triton.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from pose_megatron.rope.angles import angles, fixed_point_turns
from pose_megatron.rope.scaling import RopeScaling, inverse_frequencies

LIMITS = (12, 17, 20, 24)  # powers of two
ROPES = {
    "base 1e4": (1e4, RopeScaling()),
    "base 5e5, yarn by 16": (5e5, RopeScaling("yarn", 16.0, 8192)),
}
ARCHITECTURES = (80, 90, 100)
# Type, query heads, key heads, width of a head, rotated pairs, interleaved.
SHAPES = {
    "Llama 3 8B": ("bf16", 32, 8, 128, 64, False),
    "Llama 3 8B in float32": ("fp32", 32, 8, 128, 64, False),
    "its share on 8 ranks": ("bf16", 4, 1, 128, 64, False),
    "GPT-J": ("bf16", 16, 16, 256, 32, True),
    "a quarter of a head of 80": ("bf16", 32, 32, 80, 10, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, help="one table")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--here", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(PARTS[args.here][0]()))
        return
    if importlib.util.find_spec("triton") is None:
        print("No Triton here, so no figures: pip install triton -c constraints.txt")
        return
    results = {}
    for name, (_, show) in PARTS.items():
        if args.only in (None, name):
            results[name] = in_a_process_of_its_own(name)
            show(results[name])
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


def in_a_process_of_its_own(part: str):
    """Triton decides as it is imported whether it interprets or compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if part == "errors" and not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, __file__, "--here", part], env=environment, stdout=subprocess.PIPE
    )
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def errors() -> list[dict]:
    from pose_megatron.models.rotary_kernel import rotate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = 100_000 if device == "cuda" else 48
    generator = torch.Generator().manual_seed(0)
    rows = []
    for rope, (base, scaling) in ROPES.items():
        inv_freq = inverse_frequencies(128, base, scaling)
        for power in LIMITS:
            limit = 2**power
            below = torch.arange(limit - min(count, limit), limit)
            ids = torch.cat((below, torch.randint(limit, (count,), generator=generator)))[None]
            exact = ids.t().double() * inv_freq
            pairs = torch.zeros(ids.size(1), 1, 1, 128, device=device)
            pairs[..., :64] = 1.0  # which turn to (cos, sin)
            turned, _ = rotate(pairs, pairs, ids.to(device), fixed_point_turns(inv_freq).to(device))
            single = ids.t().float() * inv_freq.float()
            ours = angles(ids, inv_freq)[:, 0, 0, :64]
            found = {
                "float32 product, float32 frequencies": (single.cos(), single.sin()),
                "float64 product, then float32": (ours.cos(), ours.sin()),
                "the kernel": turned[:, 0, 0].cpu().chunk(2, dim=-1),
            }
            for how, (cos, sin) in found.items():
                far = torch.hypot(cos.double() - exact.cos(), sin.double() - exact.sin())
                rows.append({"how": how, "rope": rope, "power": power, "error": far.max().item()})
    return rows


def show_errors(rows: list[dict]) -> None:
    print("\nLargest error of (cos, sin) at positions below\n")
    print("| |", *(f"2^{power}, {rope} |" for rope in ROPES for power in LIMITS))
    print("|---|" + "---:|" * len(ROPES) * len(LIMITS))
    for how in dict.fromkeys(row["how"] for row in rows):
        print(f"| {how} |", *(f"{row['error']:.1e} |" for row in rows if row["how"] == how))


def registers() -> list[dict]:
    rows = []
    for shape, sizes in SHAPES.items():
        # The other pass is the same code but for one sign.
        for backward in (False, True) if shape == "Llama 3 8B" else (False,):
            for architecture in ARCHITECTURES:
                used = resources(*sizes, backward=backward, architecture=architecture)
                row = {"shape": shape, "backward": backward, "architecture": architecture}
                rows.append(row | used)
    return rows


def resources(
    dtype, query_heads, key_heads, width, pairs, interleaved, backward, architecture
) -> dict[str, int]:
    """{registers of a thread, bytes of stack and local memory of a thread} of a compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pose_megatron.models.rotary_kernel import constants, rotary_kernel

    names = rotary_kernel.arg_names
    fixed = constants(query_heads, key_heads, width, pairs, interleaved, backward)
    kinds = dict.fromkeys(fixed, "constexpr")
    kinds |= dict.fromkeys(("query", "key", "query_out", "key_out"), f"*{dtype}")
    kinds |= {"position_ids": "*i64", "turns": "*i64", "factor": "fp32"}
    # What Triton would find at a launch: pointers and strides of heads that 16 divides.
    whole = {*kinds} - {*fixed, "factor"} | {n for n in names if n.startswith(("query_", "key_"))}
    source = ASTSource(
        fn=rotary_kernel,
        signature={name: kinds.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in whole},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
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
    print("\nRegisters of a thread; bytes that it spills\n")
    print("| | pass |", *(f"sm_{architecture} |" for architecture in ARCHITECTURES), "spilled |")
    print("|---|---|" + "---:|" * (len(ARCHITECTURES) + 1))
    for start in range(0, len(rows), len(ARCHITECTURES)):
        alike = rows[start : start + len(ARCHITECTURES)]
        way = "backward" if alike[0]["backward"] else "forward"
        cells = [*(row["registers"] for row in alike), sum(row["spilled"] for row in alike)]
        print(f"| {alike[0]['shape']} | {way} |", *(f"{cell} |" for cell in cells))


def times() -> list[dict]:
    """8,192 tokens of Llama 3 8B, of two samples."""
    if not torch.cuda.is_available():
        return []
    from pose_megatron.runtime.startup import prepare_megatron

    prepare_megatron()
    from megatron.core.models.common.embeddings import rope_utils
    from triton.testing import do_bench

    from pose_megatron.models.rotary_kernel import rotate

    _, query_heads, key_heads, width, pairs, _ = SHAPES["Llama 3 8B"]
    inv_freq = inverse_frequencies(2 * pairs, 5e5, RopeScaling()).cuda()
    turns = fixed_point_turns(inv_freq)
    ids = torch.randint(2**17, (2, 4096), device="cuda").sort().values
    per_sample, one_row = angles(ids, inv_freq), angles(ids[:1], inv_freq)
    query, key = (
        torch.randn(4096, 2, heads, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (query_heads, key_heads)
    )
    grads = [torch.randn_like(x) for x in (query, key)]
    copies = [torch.empty_like(x) for x in (query, key)]

    def both_ways(turn):
        return lambda: torch.autograd.grad(turn(), (query, key), grads)

    def copy():
        for source in ((query, key), grads):
            for target, x in zip(copies, source, strict=True):
                target.copy_(x.detach())

    unfused = rope_utils._apply_rotary_pos_emb_bshd
    ways = {
        "the kernel": both_ways(lambda: rotate(query, key, ids, turns)),
        "a copy": copy,
        "unfused": both_ways(lambda: [unfused(x, per_sample) for x in (query, key)]),
    }
    if (fused := rope_utils.fused_apply_rotary_pos_emb) is not None:
        ways["Transformer Engine, one row"] = both_ways(
            lambda: [fused(x, one_row, interleaved=False) for x in (query, key)]
        )
    return [{"how": how, "ms": do_bench(way, return_mode="median")} for how, way in ways.items()]


def show_times(rows: list[dict]) -> None:
    if not rows:
        print("\nNo GPU here: no times.")
        return
    print(f"\nForward plus backward, 2 x 4,096 tokens; {torch.cuda.get_device_name()}\n")
    print("| | ms | times a copy |\n|---|---:|---:|")
    copy = next(row["ms"] for row in rows if row["how"] == "a copy")
    for row in rows:
        print(f"| {row['how']} | {row['ms']:.4f} | {row['ms'] / copy:.2f} |")


PARTS = {
    "errors": (errors, show_errors),
    "registers": (registers, show_registers),
    "times": (times, show_times),
}

if __name__ == "__main__":
    main()
