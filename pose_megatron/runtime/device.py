"""The device that a program computes on: CUDA, or the CPU, and never the CPU by mistake."""

import glob
import os

import torch

from pose_megatron.errors import ConfigError
from pose_megatron.runtime.ranks import world_size

# What drivers put there for each GPU: NVIDIA's, that of Windows' Linux, AMD's.
DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd")


def choose_device(wanted: str = "auto") -> None:
    """Settles what `device` returns, before anything else asks torch for CUDA.

    Args:
        wanted: auto, cpu or cuda.

    Raises:
        ConfigError: 'cuda' where torch cannot use it; 'auto' where torch is made for a GPU and one
            is there, which it cannot use: training would go on at a hundredth of the speed.
    """
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    if torch.cuda.is_available():
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted == "cuda":
        raise ConfigError(
            f"--device cuda: {_why_not(hidden)}. {_way_out()}, or take --device cpu to run without"
        )
    if hidden in ("", "-1") or not _made_for_a_gpu() or not (files := _device_files()):
        return
    raise ConfigError(
        f"there is a GPU ({files[0]}), but {_why_not(hidden)}. {_way_out()}, or hide it "
        "(CUDA_VISIBLE_DEVICES=) to run on the CPU"
    )


def device() -> torch.device:
    """This rank's: its GPU or the CPU, or meta where a plan has made that torch's default."""
    if (default := torch.get_default_device()).type == "meta":
        return default
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_bf16() -> None:
    """That this rank's GPU, if it has one, computes in bfloat16, and not in software.

    Raises:
        ConfigError: it does not.
    """
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        found = torch.cuda.get_device_properties(local_rank())
        raise ConfigError(
            f"--bf16: {found.name} (compute capability {found.major}.{found.minor}) has no "
            "bfloat16, which begins with Ampere, 8.0: leave the flag out to compute in float32"
        )


def local_rank() -> int:
    """This rank's number on its node, which is that of its GPU.

    Raises:
        ConfigError: there are several ranks, and nothing says which of its node's this is.
    """
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"])
    if world_size() > 1:
        raise ConfigError(
            f"WORLD_SIZE is {world_size()} and LOCAL_RANK is missing: all ranks of a node would "
            "take GPU 0. Start them with torchrun, or set LOCAL_RANK to each one's number on its "
            "node (Slurm's SLURM_LOCALID)"
        )
    return 0


def describe_device() -> str:
    """What the ranks compute on, and over what they talk."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(local_rank())
        toolkit = (
            f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        )
        return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {toolkit}, NCCL"
    ranks = f", {world_size()} ranks over gloo" if world_size() > 1 else ""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return f"CPU{ranks}: CUDA_VISIBLE_DEVICES is empty"
    if _made_for_a_gpu():
        return f"CPU{ranks}: PyTorch {torch.__version__} sees no GPU here"
    there = "; there is a GPU" if _device_files() else ""
    return f"CPU{ranks}: PyTorch {torch.__version__} is built without CUDA{there}"


def _made_for_a_gpu() -> bool:
    return bool(torch.version.cuda or torch.version.hip)


def _device_files() -> list[str]:
    return [path for pattern in DEVICE_FILES for path in sorted(glob.glob(pattern))]


def _why_not(hidden: str | None) -> str:
    """Why torch cannot use CUDA."""
    if not _made_for_a_gpu():
        return f"PyTorch {torch.__version__} is built without it"
    if hidden is not None:
        return f"CUDA_VISIBLE_DEVICES={hidden!r} leaves PyTorch none that it can use"
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return (
            f"PyTorch {torch.__version__} cannot use it: {str(error).splitlines()[0].rstrip('.')}"
        )
    return f"PyTorch {torch.__version__} finds none"


def _way_out() -> str:
    if not _made_for_a_gpu():
        return "Install a build with CUDA (https://pytorch.org/get-started)"
    return "Look at nvidia-smi: it needs a driver that is new enough for this PyTorch"
