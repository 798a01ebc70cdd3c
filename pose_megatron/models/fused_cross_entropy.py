"""--fused-cross-entropy: the loss by one kernel each way, and models that compute theirs so.

megatron-core's own cross entropy works on float32 copies of the logits, which for a large
vocabulary are among the largest tensors of a step. Here the logits stay as the output layer made
them, and in the backward pass their gradient is written over them.

So nothing else may need the logits once that pass has begun. Autograd sees to it: it is told that
the tensor has changed, and refuses to hand it to whoever saved it. A second backward pass through
the loss is refused, too.
"""

from types import ModuleType

import torch
import torch.distributed as dist
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor
from torch.autograd.function import once_differentiable

from pose_megatron.models.kernel_choice import kernel_runs

TYPES = (torch.float32, torch.bfloat16, torch.float16)  # of logits


def kernel_computes(choice: str, model: LanguageModule) -> bool:
    """Whether the kernel computes a model's loss; arguments and errors are kernel_runs'."""
    own = type(model).compute_language_model_loss
    unfit = None
    if model.config.cross_entropy_loss_fusion:
        unfit = (
            "cross_entropy_loss_fusion asks for a kernel of megatron-core's: leave it out "
            "(--cross-entropy-loss-fusion)"
        )
    elif own not in (
        LanguageModule.compute_language_model_loss,
        LossByKernel.compute_language_model_loss,
    ):
        unfit = f"{type(model).__name__} computes its loss in a way of its own"
    return kernel_runs("--fused-cross-entropy", choice, "cross_entropy_kernel", unfit)


class LossByKernel(LanguageModule):
    """A language model whose loss the kernel computes, where `loss_by_kernel` is set."""

    loss_by_kernel = False

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Labels [b, s] and logits [s, b, w], to losses [b, s]."""
        if not self.loss_by_kernel or not _takes(logits):
            return super().compute_language_model_loss(labels, logits)
        loss = cross_entropy(logits, labels.transpose(0, 1).contiguous(), self.tp_group)
        return loss.transpose(0, 1).contiguous()


def _takes(logits: Tensor) -> bool:
    return logits.dtype in TYPES and (logits.device.type != "cpu" or kernel().RUNS_ON_CPU)


def kernel() -> ModuleType:
    """The module that needs Triton."""
    from pose_megatron.models import cross_entropy_kernel

    return cross_entropy_kernel


def cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The loss of every token; the backward pass overwrites the logits.

    The numbers are those of megatron-core's vocab_parallel_cross_entropy: padding of the vocabulary
    has a share like any other entry, and a label outside it is nobody's.

    Args:
        logits: [s, b, w], this rank's share of the vocabulary; no leaf of autograd's that needs a
            gradient, because it would lose its value.
        labels: [s, b] int64, contiguous, of the whole vocabulary.
        group: the tensor-parallel ranks, in the order of their shares.

    Returns:
        [s, b] float32, nats; the same on every rank of the group.
    """
    assert not (logits.is_leaf and logits.requires_grad), "a leaf would be overwritten"
    assert labels.shape == logits.shape[:2] and labels.is_contiguous(), labels.shape
    return _CrossEntropy.apply(logits.contiguous(), labels, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, group):
        width = logits.size(-1)
        first = group.rank() * width
        here, total, picked = kernel().statistics(logits, labels, first)
        largest = here.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        mine = (labels >= first) & (labels < first + width)
        sums = torch.stack(
            (total * (here - largest).exp(), torch.where(mine, picked - largest, 0.0))
        )
        dist.all_reduce(sums, group=group)
        total, picked = sums
        ctx.save_for_backward(logits, labels, largest, total)
        ctx.first, ctx.overwritten = first, False
        return total.log() - picked

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.overwritten:
            raise RuntimeError(
                "a second backward pass through the fused cross entropy, whose first has "
                "overwritten the logits: build the model with --fused-cross-entropy off"
            )
        logits, labels, largest, total = ctx.saved_tensors
        ctx.overwritten = True
        kernel().write_gradient(logits, labels, ctx.first, largest, total, grad.contiguous())
        torch.autograd.graph.increment_version(logits)  # which a kernel does not do by itself
        return logits.detach(), None, None
