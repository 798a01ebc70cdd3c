"""Lets megatron-core run on a machine without CUDA; does nothing where there is CUDA.

megatron-core asks for its device with `torch.cuda.current_device()`, writes `device="cuda"` into
tensor factories, moves tensors with `.cuda()`, and compares dtypes by names such as
"torch.cuda.FloatTensor". `install()` gives each of these its CPU meaning, in this process and for
all threads, so that the same megatron-core code runs over gloo. Operators of the forward and
backward pass are not wrapped, so they cost nothing. What megatron-core would fuse with
`torch.compile` runs as it is written: no compiler need be there, and a process starts seconds
sooner, because torch's own is not imported.
"""

import contextlib
import functools
from unittest import mock

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


@functools.cache
def install() -> None:
    """Call it before importing megatron.core; a second call does nothing."""
    if torch.cuda.is_available():
        return
    # torch notes on first use which factories `with torch.device(...)` governs. Let it note its own
    # before they are wrapped, or models that transformers builds on the meta device come out
    # uninitialised.
    torch.utils._device._device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name, method in {
        "cuda": lambda self, *args, **kwargs: self,
        "to": _to_on_cpu(torch.Tensor.to),
        "type": _type_as_cuda(torch.Tensor.type),
    }.items():
        setattr(torch.Tensor, name, method)
    for name, function in {
        "current_device": lambda: torch.device("cpu"),
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "current_stream": lambda device=None: Stream(),
        "stream": contextlib.nullcontext,
        "Stream": Stream,
        "Event": Event,
    }.items():
        setattr(torch.cuda, name, function)
    for name in ("set_device", "synchronize", "empty_cache"):  # a function each: dynamo wants that
        setattr(torch.cuda, name, lambda *args, **kwargs: None)

    # it takes hold of torch.compile, its `jit_fuser`, when it is imported
    with mock.patch.object(torch, "compile", lambda function: function):
        from megatron.core.tensor_parallel import random
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


class Stream:
    """A stream of the CPU, where everything is done in order and there is nothing to wait for."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_event(self, event) -> None:
        pass

    def wait_stream(self, stream) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event=None) -> "Event":
        return event or Event()


class Event:
    """A point in such a stream, which is past at once."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


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
