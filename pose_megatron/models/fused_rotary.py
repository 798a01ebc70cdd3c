"""--fused-rotary: whether the kernel rotates, and the attention that has it do so.

Stock attention rotates query and key one after the other by a tensor of angles. Where the kernel
rotates, a tensor of integers travels in its place, the position ids and then the frequencies:
recomputation and CUDA graphs hand it on as any other, and it holds all that the kernel needs.
"""

import functools
from collections.abc import Sequence

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from pose_megatron.errors import ConfigError
from pose_megatron.models.kernel_choice import kernel_runs


def kernel_rotates(choice: str, attentions: Sequence[SelfAttention]) -> bool:
    """Whether the kernel rotates the queries and keys of these layers.

    Args:
        choice: as kernel_runs takes it.

    Raises:
        ConfigError: as kernel_runs; a layer that rotates by code of its own is unfit.
    """
    own = (a for a in attentions if type(a).forward is not SelfAttention.forward)
    unfit = next(
        (
            f"layer {attention.layer_number} has {type(attention).__name__}, whose forward is not "
            "megatron-core's: use SelfAttention"
            for attention in own
        ),
        None,
    )
    return kernel_runs("--fused-rotary", choice, "rotary_kernel", unfit)


def takes(position_ids: Tensor) -> bool:
    """Whether the kernel can rotate by these: whole numbers, on a device that it runs on."""
    from pose_megatron.models.rotary_kernel import RUNS_ON_CPU

    return not position_ids.is_floating_point() and (position_ids.is_cuda or RUNS_ON_CPU)


def packed(position_ids: Tensor, turns: Tensor) -> Tensor:
    """What travels to the layers: position ids [b, s] and frequencies [n] as int64 [b * s + n]."""
    return torch.cat((position_ids.flatten().long(), turns))


def rotate_by_kernel(attentions: Sequence[SelfAttention]) -> None:
    """Has layers take what `packed` makes in the place of angles; they still take angles, too."""
    for attention in attentions:
        kind: type = type(attention)
        attention.__class__ = _fused(kind)


@functools.cache
def _fused(kind: type) -> type:
    return type(f"FusedRotary{kind.__name__}", (_FusedRotary, kind), {})


class _FusedRotary(SelfAttention):
    def _adjust_key_value_for_inference(
        self, inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
    ):
        # The last thing that forward() calls before it rotates, with all that the kernel needs;
        # without rotary_pos_emb it rotates no more. The same in megatron-core 0.16.1 to 0.19.2.
        numbers = None if rotary_pos_emb is None else rotary_pos_emb[0]
        if numbers is not None and not numbers.is_floating_point():
            if inference_context is not None:
                raise ConfigError(
                    "the fused rotary embedding does not rotate into megatron-core's key-value "
                    "cache: build the model with --fused-rotary off"
                )
            from pose_megatron.models.rotary_kernel import rotate

            tokens, samples = query.shape[:2]
            position_ids, turns = numbers.tensor_split([tokens * samples])
            query, key = rotate(
                query,
                key,
                position_ids.view(samples, tokens),
                turns,
                interleaved=self.config.rotary_interleaved,
            )
            rotary_pos_emb = None
        return super()._adjust_key_value_for_inference(
            inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
        )
