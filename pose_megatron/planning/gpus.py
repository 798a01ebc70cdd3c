"""GPUs by name: what their data sheets say, and the rates that a prediction takes from it."""

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from pose_megatron.errors import ConfigError
from pose_megatron.runtime.json_files import read_json

# The shares of a data sheet's rates that training is taken to attain. Assumptions: none of them
# was measured here; --rates replaces what they give.
GEMM, ATTENTION, MEMORY, LINKS = 0.66, 0.45, 0.76, 0.8
NODE = 8  # GPUs that NVLink joins
_KERNELS = ("transformer_engine", "apex")  # Adam's of these need a GPU, and hold no more


def hide_gpus() -> None:
    """Has this process run as on a machine without a GPU; call it before torch is imported."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in _KERNELS:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's word for: cannot be imported


@dataclass(frozen=True)
class Rates:
    """What a GPU attains.

    Attributes:
        gemm, attention: TFLOP/s of dense bfloat16 matrix products and of flash attention.
        memory: TB/s of all other operators.
        link: GB/s that it sends to the GPUs of its node.
        network: GB/s that it sends to other nodes.
    """

    gemm: float
    attention: float
    memory: float
    link: float
    network: float

    def __str__(self) -> str:
        return (
            f"matrix products {self.gemm:.4g} TFLOP/s, attention {self.attention:.4g} TFLOP/s, "
            f"memory {self.memory:.4g} TB/s, links {self.link:.4g} GB/s, network "
            f"{self.network:.4g} GB/s"
        )


@dataclass(frozen=True)
class Gpu:
    """A data sheet, and the memory that the driver reports.

    Attributes:
        memory: GiB.
        peak: dense bfloat16 TFLOP/s.
        bandwidth: TB/s of its memory.
        link, network: GB/s in one direction; networks are as usual beside it: 400 Gbit/s a GPU
            for Hopper and Blackwell, 200 for Ampere.
    """

    memory: float
    peak: float
    bandwidth: float
    link: float
    network: float

    @property
    def rates(self) -> Rates:
        return Rates(
            self.peak * GEMM,
            self.peak * ATTENTION,
            self.bandwidth * MEMORY,
            self.link * LINKS,
            self.network * LINKS,
        )


GPUS = {
    "A100-40GB": Gpu(39.4, 312, 1.555, 300, 25),
    "A100-80GB": Gpu(79.2, 312, 2.039, 300, 25),
    "A800": Gpu(79.2, 312, 2.039, 200, 25),
    "L40S": Gpu(44.4, 362, 0.864, 32, 25),
    "H800": Gpu(79.1, 989, 3.35, 200, 50),
    "H100": Gpu(79.1, 989, 3.35, 450, 50),
    "H200": Gpu(139.8, 989, 4.8, 450, 50),
    "B200": Gpu(178.4, 2250, 8.0, 900, 50),
}


def named(name: str) -> Gpu:
    """The GPU of a name, in any case.

    Raises:
        ConfigError: it is not in GPUS.
    """
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    raise ConfigError(
        f"--gpu {name} is not known: it is one of {', '.join(GPUS)}; for another, name the nearest "
        "and give its --gpu-memory and --rates"
    )


def rates(gpu: Gpu, text: str | None) -> Rates:
    """The rates of --rates over those of the data sheet.

    Args:
        text: `name=number,...` in the units of Rates, or a JSON file of the same names.

    Raises:
        ConfigError: a name or a number that is none.
    """
    if text is None:
        return gpu.rates
    names = [f.name for f in dataclasses.fields(Rates)]
    given: dict = {}
    if text.endswith(".json"):
        given = read_json(Path(text))
    else:
        given = dict(part.partition("=")[::2] for part in text.split(","))
    for name, value in given.items():
        try:
            given[name] = float(value)
        except (TypeError, ValueError):
            given[name] = 0.0
        if name not in names or not 0 < given[name] < 1e9:
            raise ConfigError(
                f"--rates {text}: {name} {value!r} must be a positive number by one of the names "
                f"{', '.join(names)}, such as gemm=650"
            )
    return dataclasses.replace(gpu.rates, **given)
