"""What the fake driver has counted, in a process that runs on it."""

import ctypes
import json

_driver = ctypes.CDLL(None)  # it is preloaded
_driver.fake_gpu_tallies.restype = ctypes.c_char_p


def reset() -> None:
    _driver.fake_gpu_reset()


def tallies() -> dict[str, float]:
    """Since the last reset: `launches`; `kernel NAME` (as the compiler spells it); `gemm` and
    `flops`; `wait FUNCTION` of the host for the device; `copy to host` and the like; `nccl CALL
    RANKS`, and its `bytes`."""
    return json.loads(_driver.fake_gpu_tallies())


def sum_of(counted: dict[str, float], start: str, part: str = "") -> int:
    """Of all names that begin with `start` and contain `part`."""
    return int(sum(n for name, n in counted.items() if name.startswith(start) and part in name))
