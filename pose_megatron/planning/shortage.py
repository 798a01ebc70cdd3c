"""What to do about a run that does not fit its GPUs: the answer of its plan."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch

from pose_megatron.errors import ConfigError
from pose_megatron.runtime.device import device
from pose_megatron.runtime.ranks import rank, world_size

GIB = 2**30
_PLAN = [sys.executable, "-m", "pose_megatron.commands", "plan", "--json"]
_PATIENCE = 300  # seconds that a plan may take; seldom above twenty
_ASK = "tools/plan.py with the same flags says what the run takes"
_USUAL = 2  # GiB of CUDA and NCCL themselves


@contextlib.contextmanager
def shortages_explained(argv: Sequence[str]) -> Iterator[None]:
    """Ends a run that is out of GPU memory with the layout, and the settings that help.

    Args:
        argv: flags of the run.

    Raises:
        ConfigError: in the place of torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, whole = torch.cuda.mem_get_info(device())
        what = f"rank {rank()}: {str(error).partition('. ')[0]}. "
        others = (whole - free - torch.cuda.memory_reserved(device())) / GIB
        if others > _USUAL:
            what += (
                f"Of the GPU's {whole / GIB:.1f} GiB {others:.1f} are not this run's tensors: "
                "other processes (nvidia-smi shows them) and NCCL's buffers have them. "
            )
        raise ConfigError(what + advice(argv, whole)) from error


def advice(argv: Sequence[str], memory: int) -> str:
    """What `pose-megatron plan` says of the run, in a process of its own and without GPUs.

    Args:
        memory: of a GPU, in bytes.
    """
    gib = memory / GIB
    wanted = ["--gpus", world_size(), "--gpu-memory", f"{gib:.4g}", "--reserve", f"{gib / 20:.4g}"]
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    env = {name: value for name, value in os.environ.items() if name not in ranks}
    try:
        done = subprocess.run(
            [*_PLAN, *map(str, wanted), *argv],
            env=env | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return _ASK
    if done.returncode:
        _, said, sentence = done.stderr.strip().rpartition(": error: ")
        return sentence if said else _ASK
    stages = json.loads(done.stdout)["pose"]["stages_bytes"]
    return (
        f"Its plan takes {max(stage['peak'] for stage in stages) / GIB:.1f} GiB of {gib:.1f} for "
        "tensors: another process may hold memory of this GPU (nvidia-smi tells), or it is in "
        "fragments (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True)"
    )
