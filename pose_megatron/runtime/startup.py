"""What a program does before it imports megatron-core."""

import os
import warnings

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

    For programs; importing the library changes neither.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # orders tensor-parallel overlap
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    from pose_megatron.runtime import cpu

    cpu.install()
