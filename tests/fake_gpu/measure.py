"""Trains steps on the fake GPU, each case as one rank of its job, and says what a steady step took.

    python measure.py < cases.json > figures.json

A case: `flags` of pretrain_pose.py, `world_size`, `rank`, and whether its weights are drawn
(`initialize`), which takes minutes for large models. Needs the variables of environment.py.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

# Read when torch first attends: here it is asked for its choice, and then kept from cuDNN.
os.environ.pop("TORCH_CUDNN_SDPA_DEPRIORITIZED", None)
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import trainers  # prepares megatron-core

# isort: split
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias

from pose_megatron.training import step as steps
from pose_megatron.training import trainer as trainer_module
from pose_megatron.training.optimizer import parts
from tests.fake_gpu.engine_attention import noted_choices, noted_rotations
from tests.fake_gpu.one_rank import one_rank
from tests.fake_gpu.tallies import reset, sum_of, tallies
from tests.fake_gpu.waits import noted_waits

BACKENDS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}  # at::SDPBackend
CORPUS = ["--split", "100,0,0", "--num-workers", "0", "--train-iters", "4"]


def measure(flags: list[str], world_size: int, rank: int, initialize: bool) -> dict:
    """The second step's figures, once the optimizer has its state."""
    window = int(flags[flags.index("--seq-length") + 1])
    with tempfile.TemporaryDirectory() as folder, one_rank(flags, world_size, rank):
        prefix = trainers.random_corpus(Path(folder), 1000, 2 * window + 2)
        with mock.patch.object(
            trainer_module, "initialize", trainer_module.initialize if initialize else _nothing
        ):
            run = trainers.Run([*flags, *CORPUS, "--data-path", prefix])
        choices, batches, rotations = set(), [], {}
        with _noted_attention(choices), noted_choices(choices), _noted_batches(batches):
            with noted_rotations(rotations):
                run.step()
            reset()
            torch.cuda.reset_peak_memory_stats()
            step = run.step()
            counted, peak = tallies(), torch.cuda.max_memory_allocated()
            with noted_waits() as waits:
                run.step()
        return {
            "devices": _devices(run.trainer)
            | {"batches": sorted({str(x.device) for batch in batches for x in batch.values()})},
            "parameters": sum(p.numel() for s in run.trainer.stages for p in s.parameters()),
            "updated": step.updated,
            "attention": sorted(choices),
            "batch_ids": [batch["position_ids"].tolist() for batch in batches[:1]],
            "rotations": rotations,
            "flash": sum_of(counted, "kernel ", "flash_fwd")
            - sum_of(counted, "kernel ", "splitkv_combine"),
            "softmax": sum_of(counted, "kernel ", "SoftMaxForward")
            + sum_of(counted, "kernel ", "softmax_warp_forward"),
            "peak": peak,
            # As plans count them.
            "launches": int(counted["launches"])
            + sum_of(counted, "copy ")
            + sum_of(counted, "nccl "),
            "gemm": int(counted["gemm"]),
            "flops": counted["flops"],
            "waits": {k.split()[1]: int(n) for k, n in counted.items() if k.startswith("wait ")},
            "lines": dict(waits.most_common()),
            "nccl": {k: n for k, n in counted.items() if k.startswith(("nccl ", "bytes "))},
        }


def _nothing(*args, **kwargs) -> None:
    """Weights that nobody reads need not be drawn."""


def _devices(trainer) -> dict[str, list[str]]:
    """{what: the devices that its tensors are on}."""
    optimizers = parts(trainer.optimizer)
    states = [
        value
        for optimizer in optimizers
        for state in optimizer.optimizer.state.values()
        for name, value in state.items()
        if name != "step"  # AdamW keeps its count on the host
    ]
    masters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    places = {
        "parameters": [p for stage in trainer.stages for p in stage.parameters()],
        "optimizer": [*states, *masters],
    }
    return {what: sorted({str(x.device) for x in tensors}) for what, tensors in places.items()}


def _noted_attention(choices: set[str]):
    """Notes which backend torch would take for each call. cuDNN's is asked for and not run."""
    real = F.scaled_dot_product_attention

    def attention(query, key, value, **options):
        if not isinstance(options.get("attn_mask"), CausalBias):
            chosen = torch._fused_sdp_choice(query, key, value, **options)
            choices.add(BACKENDS[int(chosen)])
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            if isinstance(options.get("attn_mask"), CausalBias):  # which chooses by itself
                return CausalBias._dispatch(query, key, value, **options)
            return real(query, key, value, **options)
        finally:
            torch.backends.cuda.enable_cudnn_sdp(True)

    return mock.patch.object(F, "scaled_dot_product_attention", attention)


def _noted_batches(batches: list[dict]):
    real = steps.get_batch

    def get_batch(*args, **kwargs):
        batch = real(*args, **kwargs)
        batches.append({name: x for name, x in batch.items() if x is not None})
        return batch

    return mock.patch.object(steps, "get_batch", get_batch)


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    print(json.dumps({name: measure(**case) for name, case in cases.items()}))
