"""The fused rotary embedding in Triton's interpreter, which runs on a CPU.

    python tests/functional_tests/fused_rotary.py kernel     against float64
    python tests/functional_tests/fused_rotary.py training   whole models, with it and without

Prints one JSON object. A process of its own: whether Triton interprets is decided as it is imported.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # a test that takes the names below does not interpret
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import contextlib
import dataclasses
import importlib
import json
import tempfile
from unittest import mock

import torch

ROTATION = "rotary_kernel", ("_launch",)  # its module, and what launches it
FACTOR = 1.2079  # YaRN's, by 8
# Tokens, samples, query heads, key heads, width of a head, channels that rotate, interleaved.
SHAPES = {
    "grouped": (3, 2, 4, 2, 128, 128, False),
    "interleaved": (2, 2, 4, 1, 64, 64, True),
    "partial": (2, 2, 3, 3, 80, 20, False),
    "partial, interleaved": (2, 2, 2, 2, 96, 64, True),
    "more heads than at once": (2, 2, 40, 4, 32, 32, False),
}


def kernel() -> dict:
    """{shape: {type: relative errors of query, key and the gradients}}; see `errors`."""
    return {
        name: {
            str(dtype)[6:]: errors(*shape, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
        }
        for name, shape in SHAPES.items()
    }


def errors(tokens, samples, queries, keys, width, rotated, interleaved, dtype) -> dict:
    """Norms of differences from float64 over norms, and the largest of (cos, sin) itself.

    Query and key are views of one tensor, as megatron-core cuts them, and so are the ids.
    """
    from pose_megatron.models.rotary_kernel import rotate
    from pose_megatron.rope.angles import fixed_point_turns

    torch.manual_seed(0)
    inv_freq = 10000.0 ** (-torch.arange(0, rotated, 2).double() / rotated)
    turns = fixed_point_turns(inv_freq)
    ids = torch.randint(2**24, (tokens, samples)).t()
    ids[0, 0] = 2**24 - 1
    share = queries // keys
    qkv = torch.randn(tokens, samples, keys, (share + 2) * width).to(dtype).requires_grad_()
    query, key, _ = qkv.split([share * width, width, width], dim=3)
    query = query.reshape(tokens, samples, queries, width)
    inputs = [query, key]
    assert not key.is_contiguous() and not ids.is_contiguous()
    found = rotate(*inputs, ids, turns, FACTOR, interleaved)
    upstream = [torch.randn(*x.shape[:3], 2 * width).to(dtype)[..., ::2] for x in found]
    gradients = torch.autograd.grad(found, inputs, upstream)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = [formula(x, ids, inv_freq, interleaved) for x in exact]
    exact_gradients = torch.autograd.grad(wanted, exact, [g.double() for g in upstream])
    result = {
        name: ((a.double() - b).norm() / b.norm()).item()
        for name, a, b in zip(
            ("query", "key", "query's gradient", "key's gradient"),
            (*found, *gradients),
            (*wanted, *exact_gradients),
            strict=True,
        )
    }
    # Pairs (1, 0) turn to (cos, sin); one id for all samples, without a stride.
    ones = torch.zeros(tokens, samples, 1, width, dtype=dtype)
    ones[..., 0:rotated:2] = 1.0 if interleaved else 0.0
    ones[..., : rotated // 2] += 0.0 if interleaved else 1.0
    same = ids[:1].expand(samples, tokens)
    turned = rotate(ones, ones, same, turns, 1.0, interleaved)[0].double()
    far = (turned - formula(ones.double(), same, inv_freq, interleaved, 1.0))[..., :rotated]
    pairs = far.unflatten(-1, (-1, 2)) if interleaved else far.unflatten(-1, (2, -1)).mT
    # What float32 frequencies alone would cost.
    single = (ids.t().double()[..., None] * (inv_freq.float().double() - inv_freq)).abs().max()
    return result | {"angle": pairs.norm(dim=-1).max().item(), "float32 angle": single.item()}


def formula(x, ids, inv_freq, interleaved, factor=FACTOR):
    """RoFormer (arXiv 2104.09864), eq. 34, in float64: [s, b, h, d] by ids [b, s]."""
    n = inv_freq.numel()
    angle = ids.t()[:, :, None, None].double() * inv_freq
    cos, sin = angle.cos() * factor, angle.sin() * factor
    first, second = (
        (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(n), slice(n, 2 * n))
    )
    a, b = x[..., first], x[..., second]
    out = x.clone()
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out


SIZES = """--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48
    --vocab-size 257 --untie-embeddings-and-output-weights --init-method-std 0.1
    --seq-length 4 --max-position-embeddings 16777216 --original-max-position-embeddings 4096
    --micro-batch-size 2 --global-batch-size 2 --train-iters 3 --lr 1e-3 --num-workers 0
    --split 100,0,0"""
GROUPS = "--group-query-attention --num-query-groups 2 --rope-scaling yarn"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
MODELS = {  # flags, and what of the model only a checkpoint could say
    "grouped queries, YaRN, full recompute": (f"{GROUPS} {RECOMPUTE}", {}),
    "GPT-J": ("--rotary-percent 0.5 --rope-scaling linear", {"family": "gptj"}),
    "HybridModel": (f"{GROUPS} --model-class hybrid", {}),
}


def training() -> dict:
    """{model: {off, on: rows of loss, gradient norm and rotations by the kernel}}; the first model
    also with the kernel at frequencies rounded to float32."""
    from pose_megatron.runtime import cpu

    cpu.install()
    from pose_megatron.models import rotary
    from pose_megatron.rope import angles
    from pose_megatron.runtime.megatron_core import common_state_is_an_object
    from tests.conftest import write_corpus

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        generator = torch.Generator().manual_seed(0)
        documents = torch.randint(257, (8, 100), generator=generator).tolist()
        corpus = write_corpus(Path(folder) / "text_document", documents)
        for name, (words, change) in MODELS.items():
            if name == "HybridModel" and not common_state_is_an_object():
                continue
            words = f"{SIZES} {words} --data-path {corpus} --fused-rotary"
            found[name] = {how: steps(f"{words} {how}", change) for how in ("off", "on")}
            if len(found) == 1:
                rotary.fixed_point_turns = lambda f: angles.fixed_point_turns(f.float())
                found[name]["rounded"] = steps(f"{words} on", change, count=1)
                rotary.fixed_point_turns = angles.fixed_point_turns
    return found


def steps(words: str, change: dict, watched: tuple = ROTATION, count: int = 3) -> list[dict]:
    """The first steps of our trainer, with the launches of a kernel: its module and functions."""
    from pose_megatron.config.arguments import parse
    from pose_megatron.config.layout import lay_out
    from pose_megatron.runtime import distributed
    from pose_megatron.training.run import assemble
    from pose_megatron.training.step import train_step
    from pose_megatron.training.trainer import setup

    args = parse(words.split())
    run = assemble(args)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, **change))
    if not torch.distributed.is_initialized():
        distributed.initialize(args.training.seed)
    trainer = setup(run, lay_out(args, run.model, 1))
    samples, *_ = run.datasets(args.training.train_iters * args.training.global_batch_size)
    data = trainer.data_iterator(samples, 0, 0)
    for model in trainer.models:
        model.train()
    module, names = importlib.import_module(f"pose_megatron.models.{watched[0]}"), watched[1]
    rows = []
    with contextlib.ExitStack() as stack:
        launches = [
            stack.enter_context(mock.patch.object(module, name, wraps=getattr(module, name)))
            for name in names
        ]
        for _ in range(count):
            step = train_step(trainer, data)
            seen = sum(launch.call_count for launch in launches)
            rows.append({"loss": step.loss, "grad_norm": step.grad_norm, "launches": seen})
            for launch in launches:
                launch.reset_mock()
    return rows


if __name__ == "__main__":
    print(json.dumps({"kernel": kernel, "training": training}[sys.argv[1]]()))
