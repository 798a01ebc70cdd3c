"""The gradient's norm and its clipping, without waiting for the GPU at every tensor.

megatron-core has kernels over many tensors for both from Transformer Engine or NVIDIA's apex.
Without them it fetches the norm of each tensor to the host, and clips into a copy of each.
"""

import functools
from collections.abc import Sequence

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads
from torch import Tensor


@functools.cache
def mend_gradient_norm() -> None:
    """Puts torch's operators over many tensors in the place of megatron-core's substitutes."""
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _norm
        clip_grads.multi_tensor_scale_impl = _scale


def _norm(chunk_size: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], *_):
    """(the norm of all tensors as one vector [1], None), as amp_C.multi_tensor_l2norm."""
    norms = torch._foreach_norm(list(lists[0]))
    return torch.linalg.vector_norm(torch.stack(norms)).reshape(1), None


def _scale(chunk_size: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], by: float) -> None:
    """The second tensors become the first ones times `by`, as with amp_C.multi_tensor_scale."""
    sources, targets = map(list, lists)
    if lists[0] is not lists[1]:
        torch._foreach_copy_(targets, sources)
    torch._foreach_mul_(targets, by)
