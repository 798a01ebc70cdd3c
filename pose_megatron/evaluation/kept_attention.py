"""Attention over the keys and values of everything that was read, a chunk of queries at a time.

Shapes: s = this rank's tokens of a chunk (chunk / cp), p = this rank's tokens before it, b = rows,
h = this rank's heads, g = this rank's query groups, d = kv_channels.

Under context parallelism rank r holds the r-th part of every chunk, in token order, so keys and
values take a cp-th of their memory on each rank; those of one layer are gathered while it attends.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from pose_megatron.models import attention


@dataclass
class Place:
    """Where the chunk in hand stands; the layers of a stage share it.

    Attributes:
        capacity: tokens per row that this rank has to keep.
        before: tokens of this rank before the chunk, p.
    """

    capacity: int = 0
    before: int = 0


class KeptAttention(torch.nn.Module):
    """A layer's core attention that remembers."""

    def __init__(self, core: attention.SdpaCoreAttention, place: Place):
        super().__init__()
        self.scale, self.group, self.place = core.scale, core.group, place
        self._kept: Tensor | None = None  # keys and values, [2, b, g, capacity, d]

    def forget(self) -> None:
        """Gives its memory back."""
        self._kept = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_, **__) -> Tensor:
        """query [s, b, h, d], key and value [s, b, g, d] -> [s, b, h*d]."""
        query = query.permute(1, 2, 0, 3)
        own = torch.stack([key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)])
        p, s = self.place.before, own.size(3)
        if self._kept is None:
            self._kept = own.new_empty(*own.shape[:3], self.place.capacity, own.size(4))
        before = self._kept[:, :, :, :p]
        if self.group.size() > 1:
            chunk = self._gathered(own)[:, :, :, : s * self.group.rank()]
            before = torch.cat([self._gathered(before), chunk], dim=3)
        out = attend(query, before[0], before[1], own[0], own[1], self.scale)
        self._kept[:, :, :, p : p + s] = own
        return out.permute(2, 0, 1, 3).flatten(2).contiguous()

    def _gathered(self, part: Tensor) -> Tensor:
        """[2, b, g, s, d] of each rank -> [2, b, g, cp*s, d], one rank's behind the other's."""
        n, (two, b, g, s, d) = self.group.size(), part.shape
        parts = part.new_empty(n * two, b, g, s, d)
        if s:
            dist.all_gather_into_tensor(parts, part.contiguous(), group=self.group)
        return parts.view(n, *part.shape).permute(1, 2, 3, 0, 4, 5).reshape(two, b, g, n * s, d)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> Tensor:
    """Queries see all keys before their chunk, and in it those up to their own.

    Args:
        query: [b, h, s, d].
        keys, values: before the chunk, [b, g, n, d], in any order.
        key, value: of the chunk, [b, g, s, d].
        scale: of q.k; None: 1 / sqrt(d).

    Returns:
        [b, h, s, d].
    """
    if keys.size(2) == 0:
        return attention.attend(query, key, value, is_causal=True, scale=scale)
    if query.is_cuda:
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        mask = causal_lower_right(query.size(2), keys.size(2))
        return attention.attend(query, keys, values, attn_mask=mask, scale=scale)
    # On a CPU such a mask is a matrix, and takes a third longer than these two parts without one.
    far, far_weight = _flash_on_cpu(query, keys, values, False, scale)
    near, near_weight = _flash_on_cpu(query, key, value, True, scale)
    share = torch.sigmoid(near_weight - far_weight)[..., None]
    return torch.lerp(far.float(), near.float(), share.float()).to(query.dtype)


def _flash_on_cpu(query, keys, values, is_causal, scale):
    """(attention, log of the sum of its exponentials [b, h, s]), which torch's public function
    keeps to itself."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, is_causal, scale=scale
    )
