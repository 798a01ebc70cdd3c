"""What a program does before it imports megatron-core."""

import os
import sys
import warnings

from pose_megatron.errors import ConfigError
from pose_megatron.runtime.cli import print_error
from pose_megatron.runtime.megatron_core import megatron_core_version
from pose_megatron.runtime.ranks import rank

# Warnings of megatron-core and torch at every start, about optional packages and about deprecated
# names that only they can change.
KNOWN_WARNINGS = (
    ".*Apex (is|are) not installed",
    "full scope is deprecated",
    r"`(torch\.distributed\.)?\w+` is deprecated",
    "Please use DTensor instead",
    "The .grad attribute of a Tensor that is not a leaf",
)


def prepare_megatron() -> None:
    """Mutes known warnings, and lets megatron-core run on a machine without CUDA.

    For programs; importing the library changes neither. Where megatron-core is missing or too old,
    it ends the program with a sentence that says what to install.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # orders tensor-parallel overlap
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    from pose_megatron.runtime import cpu

    try:
        megatron_core_version()
    except ConfigError as error:
        if rank() == 0:
            print_error(error)
        sys.exit(1)
    cpu.install()
