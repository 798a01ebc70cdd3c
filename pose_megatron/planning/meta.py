"""One rank of a job of any size, in this process, without a GPU, without memory and without peers.

Tensors are on torch's meta device: they have shapes and types, and no numbers. Process groups are
torch's fake ones. The code that runs is the trainer's and megatron-core's own; only what a GPU
would run as one fused kernel is put in by hand, because its pieces would be counted otherwise.
"""

import contextlib
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext, _device_constructors

from pose_megatron.errors import ConfigError
from pose_megatron.runtime import cpu, distributed

META = torch.device("meta")


class OnMeta(DeviceContext):
    """Every tensor is on the meta device, wherever code asks for it; its numbers are all one.

    What depends on them is the way of the tokens through a mixture of experts: there each expert
    gets as many, and a token goes to the share `routed` of them.

    torch hands a mode its own factories, and of a tensor's methods what cpu.install() has put in
    their place. As a DeviceContext it is what torch.get_default_device() answers; on the stack it
    stands like any other mode.
    """

    __enter__ = TorchFunctionMode.__enter__
    __exit__ = TorchFunctionMode.__exit__

    def __init__(self, routed: float):
        super().__init__(META)
        tensor = torch.Tensor
        self.factories = _device_constructors() | {
            inspect.unwrap(getattr(torch, name)) for name in cpu.FACTORIES
        }
        self.routed, self.each = routed, 0
        self.answers: dict[Any, Callable] = _ANSWERS | {
            tensor.cuda: lambda tensor, *args, **kwargs: tensor.to(META),
            tensor.sum: self._sum,
            tensor.cpu: self._counts_on_the_host,
            tensor.masked_select: self._select,
            torch.autograd.backward: self._backward,
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if type(func) is torch._ops.OpOverload:  # what a call has come down to
            return func(*args, **kwargs or {})
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

    def _sum(self, tensor, *args, **kwargs):
        if tensor.dtype is torch.bool:  # [tokens, experts], over its tokens
            self.each = round(tensor.size(0) * self.routed)
        return tensor.sum(*args, **kwargs)

    def _counts_on_the_host(self, sums):
        """The sums of a mask, for which the host waits."""
        _fetch(sums)
        return torch.full(sums.shape, self.each, dtype=sums.dtype)

    def _select(self, tensor, mask):
        """By a mask [experts, tokens]."""
        return _Selection.apply(tensor, mask, round(mask.size(1) * self.routed))


def _several(value) -> tuple:
    return (value,) if isinstance(value, torch.Tensor) or value is None else tuple(value)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """Flash attention, which saves its output and one number a query."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, 0.0, True, scale=options.get("scale"))[0]


class _RMSNorm(torch.autograd.Function):
    """The fused kernel, which saves its input and one float32 a row; on meta, torch's falls apart.

    The products stand for passes over memory of the same size.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return x * grad, torch.zeros_like(weight)  # each by a kernel of its own


def _rms_norm(input, normalized_shape, weight=None, eps=None):
    return _RMSNorm.apply(input, weight)


_OPERATORS = torch.library.Library("pose_megatron", "FRAGMENT")
_OPERATORS.define("rotate(Tensor query, Tensor key) -> (Tensor, Tensor)")
_OPERATORS.impl("rotate", lambda *tensors: tuple(map(torch.empty_like, tensors)), "Meta")


class _Rotation(torch.autograd.Function):
    """The fused kernel, which reads queries and keys, or their gradients, and writes as much."""

    @staticmethod
    def forward(ctx, query, key):
        return torch.ops.pose_megatron.rotate(query, key)

    @staticmethod
    def backward(ctx, *grads):
        return torch.ops.pose_megatron.rotate(*grads)


class _RotaryKernel(types.ModuleType):
    """models.rotary_kernel, which needs Triton."""

    RUNS_ON_CPU = True

    @staticmethod
    def rotate(query, key, position_ids, turns, interleaved):
        return _Rotation.apply(query, key)


def _kernel_runs(flag: str, choice: str, kernel: str, unfit: str | None = None) -> bool:
    return choice != "off" and unfit is None


def _fetch(tensor: torch.Tensor) -> float:
    """One number of a tensor, for which the host waits."""
    return tensor.view(-1)[0].item()


def _tolist(tensor: torch.Tensor) -> list[float]:
    return [_fetch(tensor)] * tensor.numel()


class _Selection(torch.autograd.Function):
    """What stands at the places of a mask, `each` in a row of it: found by their indices, as on a
    GPU, where the host fetches how many there are."""

    @staticmethod
    def forward(ctx, tensor, mask, each):
        _fetch(mask)
        ctx.save_for_backward(mask)
        count = mask.size(0) * each
        mask.new_empty((count, mask.dim()), dtype=torch.int64).zero_()
        return tensor.new_ones(count)

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return grad.new_zeros(mask.shape), None, None


class _CrossEntropy:
    """The kernel, which reads the logits once, and once more as it writes the gradient there."""

    RUNS_ON_CPU = True

    @staticmethod
    def statistics(logits, labels, first):
        logits.amax(-1)
        return tuple(labels.new_empty(labels.shape, dtype=torch.float32) for _ in range(3))

    @staticmethod
    def write_gradient(logits, labels, first, largest, total, grad):
        logits.neg_()


_ANSWERS: dict[Any, Callable] = {
    torch.Tensor.tolist: _tolist,
    torch.Tensor.normal_: lambda tensor, *args, **kwargs: tensor,
    F.scaled_dot_product_attention: _attention,
    F.rms_norm: _rms_norm,
}


@contextlib.contextmanager
def one_rank(rank: int, world_size: int, sizes: dict, routed: float = 1.0) -> Iterator[None]:
    """This process as one rank of a job, until the end of the context.

    Args:
        sizes: of the model-parallel groups, as `distributed.initialize` takes them.
        routed: to which share of the experts a token goes.

    Raises:
        ConfigError: this process is a rank of a real job.
    """
    from megatron.core import parallel_state
    from megatron.core.fusions import fused_bias_swiglu
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from pose_megatron.models import attention, fused_cross_entropy, fused_rotary

    if dist.is_initialized():
        raise ConfigError("a plan needs a process that has not joined a process group")
    new_group = dist.new_group
    patches = {
        (dist, "new_group"): lambda *args, **kwargs: new_group(
            *args, **kwargs | {"backend": "fake"}
        ),
        (dist, "all_gather_object"): _all_the_same,
        (dist, "batch_isend_irecv"): _one_by_one,  # no fake group has the meta device for its own
        # The mask of context parallelism, a subclass of tensors: attention is causal here anyway.
        (attention, "causal_lower_right"): lambda queries, keys: None,
        # One kernel each way, which a compiler makes: operators that read and write as much.
        (fused_bias_swiglu, "swiglu"): lambda x: torch.ops.aten.glu(x, -1),
        (fused_bias_swiglu, "swiglu_back"): lambda grad, x: torch.ops.aten.glu_backward(
            grad, x, -1
        ),
        # As on a GPU with Triton.
        (fused_rotary, "kernel_runs"): _kernel_runs,
        (fused_cross_entropy, "kernel_runs"): _kernel_runs,
        (fused_cross_entropy, "kernel"): lambda: _CrossEntropy,
        # AdamW takes the same path as on a GPU.
        (
            importlib.import_module("torch.optim.optimizer"),
            "_get_fused_kernels_supported_devices",
        ): lambda: ["meta"],
    }
    with contextlib.ExitStack() as stack:
        for (owner, name), replacement in patches.items():
            stack.enter_context(mock.patch.object(owner, name, replacement))
        kernel = "pose_megatron.models.rotary_kernel"
        stack.enter_context(mock.patch.dict(sys.modules, {kernel: _RotaryKernel(kernel)}))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            distributed.initialize(**sizes)
            with OnMeta(routed):
                yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _all_the_same(gathered: list, value, group=None) -> None:
    gathered[:] = [value] * len(gathered)


def _one_by_one(operations: list) -> list:
    return [each.op(each.tensor, each.peer, each.group, each.tag) for each in operations]
