"""What a program does before it imports megatron-core."""

import logging
import os
import warnings

from pose_megatron.errors import ConfigError
from pose_megatron.runtime.cli import refuse
from pose_megatron.runtime.megatron_core import megatron_core_version

DEVICES = ("auto", "cpu", "cuda")  # what --device takes
# Warnings of megatron-core and torch at every start, about optional packages and about names and
# calls that only they, or we, can change.
KNOWN_WARNINGS = (
    ".*Apex (is|are) not installed",
    "full scope is deprecated",
    r"`(torch\.distributed\.)?\w+` is deprecated",
    "Please use DTensor instead",
    "The .grad attribute of a Tensor that is not a leaf",
    r"Mimo\w+ is experimental",
    "The argument order of load has been changed",
    "torch.distributed is disabled, unavailable or uninitialized",  # as a reader of files means it
    "Could not determine rank from torch.distributed",
    r"barrier\(\): using the device under current context",  # which distributed.initialize settled
    "invalid escape sequence",  # of megatron-core 0.19, where installing did not compile it
)
# The same, in megatron-core's logs: logger -> what the lines begin with.
KNOWN_LOG_LINES = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    "megatron.core.distributed.distributed_data_parallel": (
        "DistributedDataParallel: full_param_layout not provided"
    ),
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # a toolkit, and --device cpu
}


def prepare_megatron(device: str = "auto") -> None:
    """Mutes known warnings, and lets megatron-core run on a machine without CUDA.

    For programs; importing the library changes neither. Where megatron-core is missing or too old,
    or `device` (--device) is not to be had, it ends the program with a sentence that says what to
    do.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # orders tensor-parallel overlap
    _mute()
    from pose_megatron.runtime import cpu, transformer_engine
    from pose_megatron.runtime.device import choose_device

    try:
        megatron_core_version()
        choose_device(device)
    except ConfigError as error:
        refuse(error)
    transformer_engine.fault()  # hides it where it is broken
    cpu.install()


def _mute() -> None:
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, start in KNOWN_LOG_LINES.items():
        logging.getLogger(name).addFilter(_Without(start))


class _Without(logging.Filter):
    """Lets everything pass but lines that begin with `start`."""

    def __init__(self, start: str):
        super().__init__()
        self._start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._start)
