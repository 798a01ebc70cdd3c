"""Lets megatron-core run on a machine without CUDA; does nothing where there is CUDA.

megatron-core asks for its device with `torch.cuda.current_device()`, writes `device="cuda"` into
tensor factories, moves tensors with `.cuda()`, and compares dtypes by names such as
"torch.cuda.FloatTensor". `install()` gives each of those words its CPU meaning, in this process and
for all threads, so that the same megatron-core code runs over gloo. Only factories are wrapped:
no operator of the forward or backward pass pays for it.
"""

import functools

import torch
import torch.utils._device

FACTORIES = (
    "arange",
    "empty",
    "full",
    "ones",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "empty_like",
    "full_like",
    "ones_like",
    "zeros_like",
)


def install() -> None:
    """Idempotent; call before importing megatron.core."""
    if torch.cuda.is_available() or getattr(torch, "_pose_megatron_cpu", False):
        return
    torch._pose_megatron_cpu = True
    # torch notes on first use which factories `with torch.device(...)` governs; let it note its
    # own, or models that transformers builds on the meta device come out uninitialised.
    torch.utils._device._device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.to = _to_on_cpu(torch.Tensor.to)
    torch.Tensor.type = _type_as_cuda(torch.Tensor.type)
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)

    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _is_cuda(device) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _on_cpu(factory):
    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapped


def _to_on_cpu(to):
    @functools.wraps(to)
    def wrapped(self, *args, **kwargs):
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return to(self, *args, **kwargs)

    return wrapped


def _type_as_cuda(type_):
    @functools.wraps(type_)
    def wrapped(self, *args, **kwargs):
        if args or kwargs:
            return type_(self, *args, **kwargs)
        return type_(self).replace("torch.", "torch.cuda.", 1)

    return wrapped
