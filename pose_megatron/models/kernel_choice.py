"""Flags that say whether a Triton kernel of ours runs: auto, on or off."""

import importlib
import logging

import torch
from megatron.core.utils import log_single_rank

from pose_megatron.errors import ConfigError

logger = logging.getLogger(__name__)

CHOICES = ("auto", "on", "off")


def kernel_runs(flag: str, choice: str, kernel: str, unfit: str | None = None) -> bool:
    """Whether a kernel runs.

    Args:
        flag: such as --fused-rotary.
        choice: `auto`, wherever there is a CUDA device; `on`, or an error; `off`.
        kernel: its module in pose_megatron.models, which imports Triton.
        unfit: why it cannot run in this model, with the way out; None if it can.

    Raises:
        ConfigError: another choice; or `on` without Triton or CUDA, or where it is unfit.
    """
    if choice not in CHOICES:
        raise ConfigError(f"{flag} {choice} is none of {', '.join(CHOICES)}")
    cuda = torch.cuda.is_available()
    if choice == "off" or (choice == "auto" and not cuda):
        return False
    reason = _missing(kernel, cuda) or unfit
    if reason and choice == "on":
        raise ConfigError(
            f"{flag} on: {reason}; or say {flag} auto, which then does without the kernel"
        )
    if reason:
        log_single_rank(logger, logging.INFO, f"{flag} auto: no kernel, because {reason}")
    return reason is None


def _missing(kernel: str, cuda: bool) -> str | None:
    try:
        module = importlib.import_module(f"pose_megatron.models.{kernel}")
    except ImportError as error:
        return (
            f"Triton cannot be imported ({error}): pip install triton, which also comes with "
            "PyTorch's CUDA builds"
        )
    if not cuda and not module.RUNS_ON_CPU:
        return "torch finds no CUDA device, and Triton compiles for GPUs only: start it on a GPU"
    return None
