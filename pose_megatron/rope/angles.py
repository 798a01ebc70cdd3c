"""Rotary angles at any position ids, and frequencies that whole positions multiply exactly."""

import math

import torch
from torch import Tensor


def angles(position_ids: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotary angles at any positions, whole or not: [b, s] -> float32 [s, b, 1, rotary_dim].

    The halves (f, f) are what megatron-core's unfused, non-interleaved rotary takes. The product is
    elementwise in float64 (a matmul would meet TF32) and is brought into [-pi, pi] before the cast:
    the error stays below 2e-7 radians up to position 10^6, where a float32 product is off by 6e-2.

    Args:
        inv_freq: radians per position, [rotary_dim / 2].
    """
    turn = 2 * math.pi
    inv_freq = inv_freq.to(position_ids.device, torch.float64)
    product = position_ids.t().double()[..., None, None] * inv_freq
    half = (product - turn * torch.round(product / turn)).float()
    return torch.cat((half, half), dim=-1)


def fixed_point_turns(inv_freq: Tensor) -> Tensor:
    """Frequencies in units of 2^-64 turns per position, modulo a turn: [n] -> int64 [n].

    Whole positions times these wrap round where turns do, so no position is too large. What is left
    is the rounding of `inv_freq` and of this quotient: at position p at most p 2^-52 radians for
    each radian per position, 4e-9 at 2^24.

    Args:
        inv_freq: radians per position, float64.
    """
    turns = inv_freq.double() / (2 * math.pi)
    turns = turns - torch.floor(turns + 0.5)  # in [-1/2, 1/2), which an int64 holds
    return (turns * 2.0**64).round().to(torch.int64)
