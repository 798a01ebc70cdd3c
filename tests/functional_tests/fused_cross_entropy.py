"""The fused cross entropy in Triton's interpreter, which runs on a CPU.

    python tests/functional_tests/fused_cross_entropy.py kernel     against float64
    python tests/functional_tests/fused_cross_entropy.py training   whole models, with it and without
    torchrun --nproc-per-node 2 tests/functional_tests/fused_cross_entropy.py ranks
                                                          against megatron-core's, and float64

Prints one JSON object. A process of its own: whether Triton interprets is decided as it is imported.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # a test that takes the names below does not interpret
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import json
import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F

TYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (40, 4096, 9001)  # less than a pass of the kernel takes, just that, and two and a rest
TOKENS, SAMPLES = 3, 2


def kernel() -> dict:
    """{width: {type: errors}}, see `errors`; and losses and gradients of rows known by hand."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found: dict = {}
    for width in WIDTHS:
        found[width] = {}
        for dtype in TYPES:
            logits, labels, slope = sample(width, dtype)
            ours = by_kernel(logits, labels, slope)
            found[width][str(dtype)[6:]] = errors(ours, by_float64(logits, labels, slope))
    by_hand = {}
    nothing = -float("inf")
    for name, row, label in (
        ("thirds", [0.0, 1.0986122886681098], 1),  # e^0 and e^(ln 3): a quarter and three
        ("large", [30000.0, 30000.0], 0),
        ("barred", [nothing] * 5000 + [0.0, 0.0], 5001),
        ("nobody's", [0.0, 0.0], -1),
        ("not a number", [0.0, float("nan")], 0),
    ):
        logits = torch.tensor(row).view(1, 1, -1)
        loss, gradient = by_kernel(logits, torch.tensor([[label]]), torch.tensor([[2.0]]))
        by_hand[name] = [loss.item(), *gradient.flatten()[-2:].tolist()]
    return found | {"by hand": by_hand}


def sample(width: int, dtype: torch.dtype):
    """Logits [s, b, w] whose largest come late, labels at either end, gradients of which one is 0."""
    torch.manual_seed(0)
    logits = 4 * torch.randn(TOKENS, SAMPLES, width) + torch.linspace(-6, 6, width)
    labels = torch.randint(width, (TOKENS, SAMPLES))
    labels[0], labels[1] = 0, width - 1
    slope = torch.rand(SAMPLES, TOKENS)
    slope[0, 0] = 0
    return logits.to(dtype), labels, slope.t()


def by_kernel(logits, labels, slope, group=None):
    """(loss, gradient of the logits)."""
    from pose_megatron.models.fused_cross_entropy import cross_entropy

    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf * 1, labels, group or dist.group.WORLD)
    return loss.detach(), torch.autograd.grad(loss, leaf, slope)[0]


def by_float64(logits, labels, slope):
    """The same, by torch in float64."""
    exact = logits.double().requires_grad_()
    loss = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none")
    loss = loss.view(labels.shape)
    return loss.detach(), torch.autograd.grad(loss, exact, slope.double())[0]


def errors(ours, wanted) -> dict:
    """The largest difference of a loss, in nats, and that of the gradient as a share of its norm."""
    (loss, gradient), (exact_loss, exact) = ours, wanted
    return {
        "loss": (loss.double() - exact_loss).abs().max().item(),
        "gradient": ((gradient.double() - exact).norm() / exact.norm()).item(),
    }


def ranks() -> dict:
    """{type: errors of this rank's share against float64 and against megatron-core}; the labels
    that are nobody's against megatron-core only."""
    from pose_megatron.runtime import cpu, distributed

    cpu.install()
    from megatron.core import parallel_state

    distributed.initialize(1, tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    found = {}
    for dtype in TYPES:
        logits, labels, slope = sample(WIDTHS[0], dtype)
        labels[2] = torch.tensor([WIDTHS[0] // 2 - 1, WIDTHS[0] // 2])  # where the shares meet
        exact_loss, exact = by_float64(logits, labels, slope)
        share = logits.chunk(2, dim=-1)[group.rank()].contiguous()
        ours = by_kernel(share, labels, slope, group)
        exact = exact_loss, exact.chunk(2, dim=-1)[group.rank()]
        rows = {"float64": errors(ours, exact), "stock": errors(ours, stock(share, labels, slope))}
        labels[0] = torch.tensor([-100, WIDTHS[0]])
        ours = by_kernel(share, labels, slope, group)
        rows["nobody's"] = errors(ours, stock(share, labels, slope))
        every: list = [None] * 2
        dist.all_gather_object(every, rows)
        found[str(dtype)[6:]] = every
    return found


def stock(logits, labels, slope):
    """(loss, gradient) of megatron-core's own."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    leaf = logits.clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(leaf, labels)
    return loss.detach(), torch.autograd.grad(loss, leaf, slope)[0]


SHAPE = "--rope-scaling yarn"
MODELS = {
    "GPTModel": SHAPE,
    "GPTModel, tied, a mean over two micro-batches": f"{SHAPE} --global-batch-size 4",
    "HybridModel": f"{SHAPE} --model-class hybrid",
}


def training() -> dict:
    """{model: {off, on: rows of loss, gradient norm and launches of the kernels}}."""
    from pose_megatron.runtime import cpu

    cpu.install()
    from pose_megatron.runtime.megatron_core import common_state_is_an_object
    from tests.conftest import write_corpus
    from tests.functional_tests.fused_rotary import SIZES, steps

    watched = "cross_entropy_kernel", ("statistics", "write_gradient")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        generator = torch.Generator().manual_seed(0)
        documents = torch.randint(257, (8, 100), generator=generator).tolist()
        corpus = write_corpus(Path(folder) / "text_document", documents)
        for name, words in MODELS.items():
            if name == "HybridModel" and not common_state_is_an_object():
                continue
            words = f"{SIZES} {words} --data-path {corpus} --fused-cross-entropy"
            if "tied" in name:
                words = words.replace("--untie-embeddings-and-output-weights", "")
            found[name] = {how: steps(f"{words} {how}", {}, watched) for how in ("off", "on")}
    return found


if __name__ == "__main__":
    programs = {"kernel": kernel, "ranks": ranks, "training": training}
    result = programs[sys.argv[1]]()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(json.dumps(result))
