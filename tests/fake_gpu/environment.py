"""The fake driver on this machine: what it needs, how it is built, and how a program runs on it."""

import importlib.util
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

GPUS = 8  # of a machine, driver/model.h
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# In this order: triton brings those of another release, and the rest of what torch's include.
HEADERS = ("cuda_runtime_api.h", "cublas_v2.h", "nccl.h", "crt/host_defines.h")


def obstacle() -> str | None:
    """Why the fake driver cannot be had here; None if it can."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA: pip install torch"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "there is no g++"
    for header in HEADERS:
        if not _folders(header):
            return f"{header}, which comes with the packages that torch requires, is missing"
    return None


@cache
def _folders(header: str) -> list[Path]:
    """Where this environment's packages have a header."""
    places = []
    for package, inside in (("nvidia", "*/include"), ("triton", "backends/nvidia/include")):
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            places += sorted(Path(place).glob(inside))
    return [place for place in places if (place / header).is_file()]


def build(folder: Path) -> Path:
    """Builds the driver into a folder, which also takes what the compilers keep; returns it."""
    folders = dict.fromkeys(_folders(header)[0] for header in HEADERS)
    command = [str(HERE / "driver/build.sh"), str(folder / "libcuda.so.1"), *map(str, folders)]
    subprocess.run(command, check=True)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The variables under which a program finds 8 GPUs.

    Args:
        folder: where `build` put the driver.
    """

    def before(first: Path, name: str) -> str:
        return os.pathsep.join(filter(None, (str(first), os.environ.get(name))))

    here = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return here | {
        "LD_PRELOAD": str(folder / "libcuda.so.1"),
        "LD_LIBRARY_PATH": before(folder, "LD_LIBRARY_PATH"),
        "TRITON_LIBCUDA_PATH": str(folder),
        "PYTHONPATH": before(HERE / "made_up", "PYTHONPATH"),
        # One root, whatever the number of ranks: the others would have to name theirs.
        "TORCH_NCCL_RANKS_PER_ROOT": "1000000",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # cuDNN's attention asks the device itself; flash attention takes its place.
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
        "OMP_NUM_THREADS": "1",
    }
