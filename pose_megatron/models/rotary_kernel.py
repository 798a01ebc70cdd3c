"""Rotary embedding at per-sample position ids: one Triton kernel for queries and keys, both ways.

The angle of a pair at position p is a fraction of a turn, p F mod 2^64, where F is its frequency in
units of 2^-64 turns: 64-bit integers wrap round as turns do, so the range is reduced exactly at any
position. The upper 32 bits of that product are the angle; its nearest quarter turn comes off as
integer bits, and short polynomials give sine and cosine of the rest. No float64, no table.

Needs Triton, so it is imported only where it rotates. With TRITON_INTERPRET=1 in the environment
before Triton is imported, the same code runs on a CPU, slowly; there results in bfloat16 are cut,
which a GPU rounds.

Shapes: s = tokens, b = samples, h = heads, d = a head's width, n = rotated pairs of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _cos_sin(angle):
    """float32 cosine and sine of int32 angles in units of 2^-32 turns; each within 1.2e-7.

    The polynomials are those of Cephes' sinf and cosf (S. Moshier), which reach a quarter of pi.
    """
    quarter = (angle + (1 << 29)) >> 30  # the nearest one, -2 to 1
    x = (angle - (quarter << 30)).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    xx = x * x
    sin = x + x * xx * (-1.6666654611e-1 + xx * (8.3321608736e-3 - xx * 1.9515295891e-4))
    tail = 4.166664568298827e-2 + xx * (-1.388731625493765e-3 + xx * 2.443315711809948e-5)
    cos = 1.0 - 0.5 * xx + xx * xx * tail
    swapped = (quarter & 1) == 1
    cos, sin = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    cos = tl.where(((quarter + 1) & 2) == 2, -cos, cos)
    sin = tl.where((quarter & 2) == 2, -sin, sin)
    return cos, sin


@triton.jit
def _rotate_heads(
    source,
    target,
    source_head,
    target_head,
    cos,
    sin,
    HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIR_LANES: tl.constexpr,
    TAIL_LANES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """All heads of one token; source and target point at its first head, *_head are strides."""
    for first in range(0, HEADS, AT_ONCE):
        head = first + tl.arange(0, AT_ONCE)[:, None]
        there = head < HEADS
        read, write = source + head * source_head, target + head * target_head
        if INTERLEAVED:
            channel = tl.arange(0, 2 * PAIR_LANES)[None, :]
            mask = there & (channel < 2 * PAIRS)
            x = tl.load(read + channel, mask=mask, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(x, (AT_ONCE, PAIR_LANES, 2)))
            y = tl.join(a * cos - b * sin, b * cos + a * sin)
            tl.store(write + channel, tl.reshape(y, (AT_ONCE, 2 * PAIR_LANES)), mask=mask)
        else:
            pair = tl.arange(0, PAIR_LANES)[None, :]
            mask = there & (pair < PAIRS)
            a = tl.load(read + pair, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(read + pair + PAIRS, mask=mask, other=0.0).to(tl.float32)
            tl.store(write + pair, a * cos - b * sin, mask=mask)
            tl.store(write + pair + PAIRS, b * cos + a * sin, mask=mask)
        if 2 * PAIRS < WIDTH:  # channels that do not rotate
            channel = 2 * PAIRS + tl.arange(0, TAIL_LANES)[None, :]
            mask = there & (channel < WIDTH)
            tl.store(write + channel, tl.load(read + channel, mask=mask), mask=mask)


@triton.jit
def rotary_kernel(
    query,
    key,
    query_out,
    key_out,
    position_ids,
    turns,
    factor,
    samples,
    query_token,
    query_sample,
    query_head,
    key_token,
    key_sample,
    key_head,
    query_out_token,
    query_out_sample,
    query_out_head,
    key_out_token,
    key_out_sample,
    key_out_head,
    ids_sample,
    ids_token,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    QUERIES_AT_ONCE: tl.constexpr,
    KEYS_AT_ONCE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIR_LANES: tl.constexpr,
    TAIL_LANES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """One token of one sample; *_token, *_sample and *_head are strides."""
    program = tl.program_id(0)
    token, sample = (program // samples).to(tl.int64), (program % samples).to(tl.int64)
    pair = tl.arange(0, PAIR_LANES)
    position = tl.load(position_ids + sample * ids_sample + token * ids_token).to(tl.int64)
    frequency = tl.load(turns + pair, mask=pair < PAIRS, other=0)
    cos, sin = _cos_sin(((position * frequency) >> 32).to(tl.int32))
    cos, sin = cos[None, :] * factor, sin[None, :] * factor
    if BACKWARD:
        sin = -sin
    _rotate_heads(
        query + token * query_token + sample * query_sample,
        query_out + token * query_out_token + sample * query_out_sample,
        query_head,
        query_out_head,
        cos,
        sin,
        QUERY_HEADS,
        QUERIES_AT_ONCE,
        WIDTH,
        PAIRS,
        PAIR_LANES,
        TAIL_LANES,
        INTERLEAVED,
    )
    _rotate_heads(
        key + token * key_token + sample * key_sample,
        key_out + token * key_out_token + sample * key_out_sample,
        key_head,
        key_out_head,
        cos,
        sin,
        KEY_HEADS,
        KEYS_AT_ONCE,
        WIDTH,
        PAIRS,
        PAIR_LANES,
        TAIL_LANES,
        INTERLEAVED,
    )


# Whether Triton interprets it.
RUNS_ON_CPU = not isinstance(rotary_kernel, triton.JITFunction)


def constants(
    query_heads: int, key_heads: int, width: int, pairs: int, interleaved: bool, backward: bool
) -> dict[str, int | bool]:
    """What a shape fixes when the kernel is compiled."""
    power = triton.next_power_of_2
    return {
        "QUERY_HEADS": query_heads,
        "KEY_HEADS": key_heads,
        "QUERIES_AT_ONCE": min(power(query_heads), 32),
        "KEYS_AT_ONCE": min(power(key_heads), 32),
        "WIDTH": width,
        "PAIRS": pairs,
        "PAIR_LANES": power(pairs),
        "TAIL_LANES": power(max(width - 2 * pairs, 1)),
        "INTERLEAVED": interleaved,
        "BACKWARD": backward,
    }


def _launch(query, key, position_ids, turns, factor, interleaved, backward):
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    tokens, samples, heads, width = query.shape
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key)]
    strides = [x.stride()[:3] for x in (query, key, *outs)]
    shape = constants(heads, key.size(2), width, turns.numel(), interleaved, backward)
    rotary_kernel[(tokens * samples,)](
        query,
        key,
        *outs,
        position_ids,
        turns,
        factor,
        samples,
        *(stride for tensor in strides for stride in tensor),
        *position_ids.stride(),
        **shape,
    )
    return tuple(outs)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, position_ids, turns, factor, interleaved):
        ctx.save_for_backward(position_ids, turns)
        ctx.factor, ctx.interleaved = factor, interleaved
        return _launch(query, key, position_ids, turns, factor, interleaved, False)

    @staticmethod
    def backward(ctx, query_grad, key_grad):
        # A rotation's transpose turns the other way.
        position_ids, turns = ctx.saved_tensors
        grads = _launch(
            query_grad, key_grad, position_ids, turns, ctx.factor, ctx.interleaved, True
        )
        return *grads, None, None, None, None


def rotate(
    query: Tensor,
    key: Tensor,
    position_ids: Tensor,
    turns: Tensor,
    factor: float = 1.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned to their positions, in one launch; the gradient takes another.

    Cosine and sine are within 2e-7 of float64's at any position up to 2^24. The first 2n channels
    of a head rotate, in float32 whatever the tensors' type; the rest stays.

    Args:
        query, key: [s, b, heads, d], with the same d and any strides.
        position_ids: [b, s], whole numbers, with any strides.
        turns: [n], contiguous, from rope.angles.fixed_point_turns.
        factor: the attention factor, by which cosine and sine are multiplied.
        interleaved: whether pairs are neighbouring channels, not of the two halves.

    Returns:
        Tensors of the shapes and types of query and key, contiguous.
    """
    assert position_ids.shape == (query.size(1), query.size(0)), position_ids.shape
    assert not position_ids.is_floating_point() and turns.dtype == torch.int64
    return _Rotate.apply(query, key, position_ids, turns, factor, interleaved)
