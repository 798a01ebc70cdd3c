"""Output layers that differ from megatron-core's: normalised as Baichuan2's, biased as GPT-J's.

Each changes the ColumnParallelLinear of a built model in place; other ranks' rows of the vocabulary
play no part in it.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    set_tensor_model_parallel_attributes,
)


class NormalizedLinear(ColumnParallelLinear):
    """Every row of the weight has length one when it is used; it is stored as it was trained."""

    def forward(self, input_, weight=None, runtime_gather_output=None):
        weight = F.normalize(self.weight if weight is None else weight)
        return super().forward(input_, weight, runtime_gather_output)


def normalize(layer: ColumnParallelLinear) -> None:
    layer.__class__ = NormalizedLinear


def add_bias(layer: ColumnParallelLinear) -> None:
    """A bias of zeros, one for each row that this rank has."""
    layer.bias = torch.nn.Parameter(layer.weight.new_zeros(layer.output_size_per_partition))
    set_tensor_model_parallel_attributes(layer.bias, True, 0, 1)
    layer.bias.allreduce = True  # over the data ranks, as the weight
