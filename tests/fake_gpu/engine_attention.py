"""Which kernels Transformer Engine's attention takes, and how queries and keys were rotated before."""

import contextlib
import sys
from collections.abc import Iterator
from unittest import mock

import torch.nn.functional as F
from megatron.core.transformer import attention as core_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from pose_megatron.models import fused_rotary, rotary, rotary_kernel

attend = F.scaled_dot_product_attention  # before anything else notes it


@contextlib.contextmanager
def noted_choices(choices: set[str]) -> Iterator[None]:
    """Notes `engine fused` (cuDNN's) or `engine unfused`. cuDNN cannot start on the fake GPU: asked
    whether it takes these shapes, it is made to say yes, and flash attention runs in its place."""
    if "transformer_engine.pytorch" not in sys.modules:
        yield
        return
    from transformer_engine.pytorch.attention.dot_product_attention import backends, utils

    cudnn = int(utils.FusedAttnBackend["F16_arbitrary_seqlen"])
    unfused = backends.UnfusedDotProductAttention.forward

    def noted_fused(self, query, key, value, *_, attn_mask_type, **__):
        choices.add("engine fused")
        assert attn_mask_type == "causal"
        # [s, b, h, d] -> [b, h, s, d]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = attend(
                query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
            )
        return out.permute(2, 0, 1, 3).flatten(2)

    def noted_unfused(self, *args, **options):
        choices.add("engine unfused")
        return unfused(self, *args, **options)

    with (
        mock.patch.object(utils, "_get_fused_attn_backend", lambda **_: (cudnn, "")),
        mock.patch.object(backends.FusedAttention, "forward", noted_fused),
        mock.patch.object(backends.UnfusedDotProductAttention, "forward", noted_unfused),
    ):
        yield


@contextlib.contextmanager
def noted_rotations(found: dict) -> Iterator[None]:
    """Notes the position ids that angles are made from, as `ids`, and how often queries and keys were
    rotated: `kernel` counts ours, both at once, and `stock` megatron-core's, one after the other."""
    found.update(ids=[], kernel=0, stock=0)
    packed, angles = fused_rotary.packed, rotary.angles
    rotate, stock = rotary_kernel.rotate, core_attention.apply_rotary_pos_emb

    def note_ids(real):
        def noted(position_ids, *args):
            found["ids"].append(position_ids.tolist())  # whole numbers, copied there
            return real(position_ids, *args)

        return noted

    def counted(name, real):
        def count(*args, **options):
            found[name] += 1
            return real(*args, **options)

        return count

    with (
        mock.patch.object(fused_rotary, "packed", note_ids(packed)),
        mock.patch.object(rotary, "angles", note_ids(angles)),
        mock.patch.object(rotary_kernel, "rotate", counted("kernel", rotate)),
        mock.patch.object(core_attention, "apply_rotary_pos_emb", counted("stock", stock)),
    ):
        yield
