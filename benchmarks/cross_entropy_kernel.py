"""The fused cross entropy: its errors, its registers and, on a GPU, its times.

    python benchmarks/cross_entropy_kernel.py

Errors are the largest distance of a loss from float64's, in nats, and the norm of the gradient's
distance over its norm, for logits of a standard deviation of 4; without a GPU, Triton's interpreter
computes them, which cuts bfloat16 where a GPU rounds. Registers are what ptxas gives the kernels,
compiled here for each architecture, and spills the bytes of stack and local memory; no GPU is
needed. Times are medians of forward plus backward pass: the kernels, a copy of as many bytes as
they read and write, and megatron-core's unfused path. Needs Triton.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from kernel_tables import ARCHITECTURES, main, resources, show_registers, show_times, timed

# Type, and a rank's share of the vocabulary.
SHAPES = {
    "Llama 2": ("bf16", 32000),
    "Llama 3": ("bf16", 128256),
    "its share on 8 ranks": ("bf16", 128256 // 8),
    "Llama 3 in float32": ("fp32", 128256),
    "a share that 16 does not divide": ("bf16", 32001),
}
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS = 8192  # of the times


def errors() -> list[dict]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for width in (32000, 128256):
        for kind, dtype in TYPES.items():
            torch.manual_seed(0)
            logits = (4 * torch.randn(8, 1, width, device=device)).to(dtype)
            labels = torch.randint(width, (8, 1), device=device)
            slope = torch.rand(8, 1, device=device)
            exact, exact_gradient = by_torch(logits.double(), labels, slope)
            for how, way in {
                f"torch in {str(dtype)[6:]}": by_torch,
                "torch on a float32 copy": lambda x, *more: by_torch(x.float(), *more),
                "the kernel": by_kernel,
            }.items():
                loss, gradient = way(logits, labels, slope)
                far = (gradient.to(dtype).double() - exact_gradient).norm()
                row = {
                    "how": how,
                    "logits": f"{width:,} in {kind}",
                    "loss": (loss.double() - exact).abs().max().item(),
                    "gradient": (far / exact_gradient.norm()).item(),
                }
                rows.append(row)
    return rows


def by_kernel(logits, labels, slope):
    from pose_megatron.models.cross_entropy_kernel import statistics, write_gradient

    largest, total, picked = statistics(logits, labels, 0)
    gradient = logits.clone()
    write_gradient(gradient, labels, 0, largest, total, slope)
    return total.log() + largest - picked, gradient


def by_torch(logits, labels, slope):
    leaf = logits.detach().requires_grad_()
    loss = F.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="none")
    loss = loss.view(labels.shape)
    return loss.detach(), torch.autograd.grad(loss, leaf, slope.to(loss.dtype))[0]


def show_errors(rows: list[dict]) -> None:
    print("\nErrors of the loss, in nats, and of the gradient\n")
    print("| logits | | loss | gradient |\n|---|---|---:|---:|")
    for row in rows:
        print(f"| {row['logits']} | {row['how']} | {row['loss']:.1e} | {row['gradient']:.1e} |")


def registers() -> list[dict]:
    from pose_megatron.models import cross_entropy_kernel as kernels

    rows = []
    for shape, (dtype, width) in SHAPES.items():
        for kernel in (kernels.statistics_kernel, kernels.gradient_kernel):
            pointers = {"logits": f"*{dtype}", "labels": "*i64"}
            numbers = ("largest", "total", "picked", "grad")
            pointers |= {name: "*fp32" for name in numbers if name in kernel.arg_names}
            whole = {*pointers} | ({"first", "width"} if width % 16 == 0 else set())
            fixed = kernels.constants(width)
            for architecture in ARCHITECTURES:
                row = {
                    "shape": shape,
                    "backward": kernel is kernels.gradient_kernel,
                    "architecture": architecture,
                }
                used = resources(
                    kernel, pointers, fixed, whole, architecture, num_warps=kernels.WARPS
                )
                rows.append(row | used)
    return rows


def times() -> list[dict]:
    """8,192 tokens of Llama 3, on one rank."""
    if not torch.cuda.is_available():
        return []
    import torch.distributed as dist

    from pose_megatron.runtime import distributed
    from pose_megatron.runtime.startup import prepare_megatron

    prepare_megatron()
    distributed.initialize(seed=1)
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from pose_megatron.models.fused_cross_entropy import cross_entropy

    dtype, width = SHAPES["Llama 3"]
    shape = {"size": (TOKENS, 1, width), "device": "cuda", "dtype": TYPES[dtype]}
    leaf = torch.randn(**shape).requires_grad_()
    labels = torch.randint(width, (TOKENS, 1), device="cuda")
    slope = torch.rand(TOKENS, 1, device="cuda")
    target = torch.empty_like(leaf)

    def both_ways(loss):
        # A view, as no leaf may be overwritten; after the first time it holds gradients.
        logits = leaf.view(leaf.shape)
        return torch.autograd.grad(loss(logits), logits, slope)

    def copy():  # two passes that read and one that writes are three halves of one
        target.copy_(leaf.detach())
        target[: TOKENS // 2].copy_(leaf.detach()[: TOKENS // 2])

    ways = {
        "the kernels": lambda: both_ways(
            partial(cross_entropy, labels=labels, group=dist.group.WORLD)
        ),
        "a copy": copy,
        "unfused": lambda: both_ways(lambda x: vocab_parallel_cross_entropy(x, labels)),
    }
    return timed(ways)


PARTS = {
    "errors": (errors, show_errors),
    "registers": (registers, show_registers),
    "times": (times, partial(show_times, what=f"Forward plus backward, {TOKENS:,} tokens")),
}

if __name__ == "__main__":
    main(__file__, __doc__, PARTS)
