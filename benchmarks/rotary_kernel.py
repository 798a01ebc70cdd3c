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

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from kernel_tables import ARCHITECTURES, main, resources, show_registers, show_times, timed

from pose_megatron.rope.angles import angles, fixed_point_turns
from pose_megatron.rope.scaling import RopeScaling, inverse_frequencies

LIMITS = (12, 17, 20, 24)  # powers of two
ROPES = {
    "base 1e4": (1e4, RopeScaling()),
    "base 5e5, yarn by 16": (5e5, RopeScaling("yarn", 16.0, 8192)),
}
# Type, query heads, key heads, width of a head, rotated pairs, interleaved.
SHAPES = {
    "Llama 3 8B": ("bf16", 32, 8, 128, 64, False),
    "Llama 3 8B in float32": ("fp32", 32, 8, 128, 64, False),
    "its share on 8 ranks": ("bf16", 4, 1, 128, 64, False),
    "GPT-J": ("bf16", 16, 16, 256, 32, True),
    "a quarter of a head of 80": ("bf16", 32, 32, 80, 10, False),
}


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
                row = {"shape": shape, "backward": backward, "architecture": architecture}
                rows.append(row | used(*sizes, backward, architecture))
    return rows


def used(
    dtype, query_heads, key_heads, width, pairs, interleaved, backward, architecture
) -> dict[str, int]:
    from pose_megatron.models.rotary_kernel import constants, rotary_kernel

    fixed = constants(query_heads, key_heads, width, pairs, interleaved, backward)
    kinds = dict.fromkeys(("query", "key", "query_out", "key_out"), f"*{dtype}")
    kinds |= {"position_ids": "*i64", "turns": "*i64", "factor": "fp32"}
    # Pointers, and strides of heads.
    strides = {n for n in rotary_kernel.arg_names if n.startswith(("query_", "key_"))}
    whole = {*kinds} - {"factor"} | strides
    return resources(rotary_kernel, kinds, fixed, whole, architecture)


def times() -> list[dict]:
    """8,192 tokens of Llama 3 8B, of two samples."""
    if not torch.cuda.is_available():
        return []
    from pose_megatron.runtime.startup import prepare_megatron

    prepare_megatron()
    from megatron.core.models.common.embeddings import rope_utils

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
    return timed(ways)


PARTS = {
    "errors": (errors, show_errors),
    "registers": (registers, show_registers),
    "times": (times, partial(show_times, what="Forward plus backward, 2 x 4,096 tokens")),
}

if __name__ == "__main__":
    main(__file__, __doc__, PARTS)
