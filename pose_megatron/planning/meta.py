"""One rank of a job of any size, in this process, without a GPU, without memory and without peers.

Tensors are on torch's meta device: they have shapes and types, and no numbers. Process groups are
torch's fake ones. The code that runs is the trainer's and megatron-core's own; only what a GPU
would run as one fused kernel is put in by hand, because its pieces would be counted otherwise.
"""

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from pose_megatron.errors import ConfigError
from pose_megatron.runtime import cpu, distributed

META = torch.device("meta")
# Their kernels need a GPU; Adam holds the same without them.
_KERNELS = ("transformer_engine", "apex")


def hide_gpus() -> None:
    """Has this process run as on a machine without a GPU; call it before torch is imported."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in _KERNELS:
        sys.modules[name] = None  # type: ignore[assignment]  # how Python says: cannot be imported


class OnMeta(TorchFunctionMode):
    """Every tensor is on the meta device, wherever code asks for it; its numbers are all one.

    torch hands a mode its own factories, and of a tensor's methods what cpu.install() has put in
    their place.
    """

    def __init__(self):
        super().__init__()
        tensor = torch.Tensor
        self.factories = _device_constructors() | {
            inspect.unwrap(getattr(torch, name)) for name in cpu.FACTORIES
        }
        self.answers = _ANSWERS | {
            tensor.cuda: lambda tensor, *args, **kwargs: tensor.to(META),
            torch.autograd.backward: self._backward,
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in self.factories:
            kwargs["device"] = META
            kwargs.pop("pin_memory", None)
        elif func in self.answers:
            return self.answers[func](*args, **kwargs)
        elif func is torch.Tensor.type and len(args) == 1:
            return f"torch.{func(*args).rpartition('.')[2]}"
        elif func is torch.Tensor.to:
            args = tuple(META if isinstance(a, str | torch.device) else a for a in args)
            if "device" in kwargs:
                kwargs["device"] = META
        return func(*args, **kwargs)

    def _backward(self, tensors, grad_tensors=None, **_) -> None:
        """torch leaves the mode while it handles a call, and the whole backward pass is one."""
        tensors = _several(tensors)
        gradients = torch.autograd._make_grads(
            tensors, _several(grad_tensors), is_grads_batched=False
        )
        with self:
            torch.autograd.graph._engine_run_backward(
                tensors, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True
            )


def _several(value) -> tuple:
    return (value,) if isinstance(value, torch.Tensor) or value is None else tuple(value)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """Flash attention, which saves its output and one number a query."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, 0.0, True, scale=options.get("scale"))[0]


def _rms_norm(input, normalized_shape, weight=None, eps=None):
    """The fused kernel, which saves its input and one number a row."""
    return torch.ops.aten._fused_rms_norm(input, list(normalized_shape), weight, eps)[0]


_ANSWERS = {
    torch.Tensor.item: lambda tensor: 1.0,
    torch.Tensor.tolist: lambda tensor: [1.0] * tensor.numel(),
    torch.Tensor.__float__: lambda tensor: 1.0,
    torch.Tensor.__int__: lambda tensor: 1,
    torch.Tensor.__bool__: lambda tensor: True,
    torch.Tensor.normal_: lambda tensor, *args, **kwargs: tensor,
    F.scaled_dot_product_attention: _attention,
    F.rms_norm: _rms_norm,
}


@contextlib.contextmanager
def one_rank(rank: int, world_size: int, sizes: dict) -> Iterator[None]:
    """This process as one rank of a job, until the end of the context.

    Args:
        sizes: of the model-parallel groups, as `distributed.initialize` takes them.

    Raises:
        ConfigError: this process is a rank of a real job.
    """
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ConfigError("a plan needs a process that has not joined a process group")
    new_group = dist.new_group
    patches = {
        (dist, "new_group"): lambda *args, **kwargs: new_group(
            *args, **kwargs | {"backend": "fake"}
        ),
        (dist, "all_gather_object"): _all_the_same,
        # AdamW takes the same path as on a GPU.
        (importlib.import_module("torch.optim.optimizer"), "_get_foreach_kernels_supported_devices"): lambda: ["meta"],
    }
    with contextlib.ExitStack() as stack:
        for (owner, name), replacement in patches.items():
            stack.enter_context(mock.patch.object(owner, name, replacement))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            distributed.initialize(**sizes)
            with META, OnMeta():
                yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _all_the_same(gathered: list, value, group=None) -> None:
    gathered[:] = [value] * len(gathered)
