"""Gradients of weights, added up in float32 by the matrix product that computes them.

megatron-core's linear layers do so through a kernel of NVIDIA's apex. cuBLAS does the same, and
torch calls it: a product of bfloat16 tensors that is added to a float32 one. Without it each
gradient is first a bfloat16 tensor of its own, rounded, and added later.
"""

import types

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor


def install() -> bool:
    """Gives megatron-core's layers `accumulate` where apex is not installed.

    Returns:
        Whether they have either; PyTorch before 2.8 has no such product.
    """
    if not layers._grad_accum_fusion_available and "dtype_out" in torch.ops.aten.addmm.overloads():
        layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(
            wgrad_gemm_accum_fp32=lambda *tensors: accumulate(*tensors)
        )
        layers._grad_accum_fusion_available = True
    return layers._grad_accum_fusion_available


def accumulate(inputs: Tensor, grads: Tensor, total: Tensor) -> None:
    """Adds grads.T @ inputs to `total`, in place.

    Args:
        inputs: bfloat16 [tokens, in].
        grads: bfloat16 [tokens, out].
        total: float32 [out, in].
    """
    torch.addmm(total, grads.t(), inputs, out_dtype=torch.float32, out=total)
