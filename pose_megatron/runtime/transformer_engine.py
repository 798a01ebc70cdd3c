"""Transformer Engine, where it is installed and works with the megatron-core that is."""

import functools
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

import torch
from packaging.requirements import Requirement

INSTALL = (
    "install it after PyTorch, from a clone: pip install --no-build-isolation '.[gpu]'; that "
    "compiles its bindings, with the headers of CUDA, cuDNN and NCCL"
)


@functools.cache
def fault() -> str | None:
    """Why Transformer Engine cannot be used, with the way out; None where it can.

    One that cannot work is hidden from then on: megatron-core takes it where it finds it, and would
    fail with it, though nothing that runs here needs it.
    """
    if find_spec("transformer_engine") is None:
        return f"it is not installed; {INSTALL}"
    if not torch.cuda.is_available():  # neither its layers nor its Adam run there
        _hide()
        return "it needs a GPU, and torch finds none"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a library that is missing is an OSError, another version anything
        _hide()
        said = str(error).strip().splitlines() or [type(error).__name__]
        return f"it is installed and cannot be imported ({said[0]}); {INSTALL}"
    return _other_version()


def _hide() -> None:
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        del sys.modules[name]
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # not to be found


def _other_version() -> str | None:
    """That megatron-core asks for another version, where its package says for which."""
    try:
        found = version("transformer_engine")
    except PackageNotFoundError:  # a build of the user's own
        return None
    for line in requires("megatron-core") or []:
        wanted = Requirement(line)
        if wanted.name != "transformer-engine" or wanted.specifier.contains(found, True):
            continue
        core = version("megatron-core")
        return f"it is {found}, and megatron-core {core} asks for {wanted.specifier}; {INSTALL}"
    return None
