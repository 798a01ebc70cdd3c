"""How a result was made: command, day, processes, machine and versions."""

import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pose_megatron import __version__
from pose_megatron.runtime.ranks import world_size

_PACKAGES = ("torch", "megatron-core", "transformers")


def provenance() -> dict[str, Any]:
    """command, date (ISO 8601), ranks, threads, device, and versions by package."""
    import torch

    versions = {"pose_megatron": __version__, "Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            pass
    return {
        "command": _command(),
        "date": datetime.date.today().isoformat(),
        "ranks": world_size(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": versions,
    }


def _command() -> str:
    """What was typed, without torchrun's part; the program is named as in this folder."""
    program, here = sys.argv[0], Path.cwd()
    if program.startswith(f"{here}{os.sep}"):
        program = str(Path(program).relative_to(here))
    return f"{program} {shlex.join(sys.argv[1:])}".strip()
