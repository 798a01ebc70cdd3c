"""How likely one sample is to contain each relative distance: Figure 5 of the PoSE paper.

A sample contains the distance d when two of its tokens have positions that differ by d. Inside a
chunk of l tokens that is every d < l; between two chunks it is every d from the nearest pair (the
end of one, the start of the other) to the farthest (the outer ends).
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from pose_megatron.positions.draws import SENTENCES, Draw
from pose_megatron.positions.laws import SkipPlan
from pose_megatron.positions.sampler import PoseSampler

_BATCH_VALUES = 2**22  # samples x distances held at once


@dataclass(frozen=True)
class Curve:
    """Coverage by distance.

    Attributes:
        probability: that a sample contains the distance d = 0, ..., T - 1, float64 [T].
        standard_error: of each probability, float64 [T]; zero where a formula gave it.
        samples: how many were drawn; 0 for a formula.
    """

    probability: np.ndarray
    standard_error: np.ndarray
    samples: int

    def bands(self, window: int) -> dict[str, float]:
        """Mean probability over ranges of distances, by name."""
        target = len(self.probability)
        edges = [1, window, target // 2, target - window, target]
        edges = [edge for i, edge in enumerate(edges) if edge > max(edges[:i], default=0)]
        pairs = [(1, target), *pairwise(edges), (target - window // 8, target)]
        return {
            f"[{low},{high})": float(self.probability[low:high].mean())
            for low, high in pairs
            if 0 < low < high
        }


def coverage(sampler: PoseSampler, source: int, samples: int, sentence: int = 25) -> Curve:
    """A sampler's curve, exact where a formula is known, else estimated from drawn samples.

    Args:
        source: Lx, tokens that a sample's text is drawn from.
        samples: how many to draw where no formula is known.
        sentence: for samplers that read tokens: each token ends a sentence with probability
            1 / sentence, independently.
    """
    exact = _formula(sampler, source)
    if exact is not None:
        return Curve(exact, np.zeros_like(exact), 0)
    hits = np.zeros(sampler.target)
    reads = sampler.reads_tokens
    if reads:
        sampler = replace(sampler, boundaries=sampler.boundaries[:1])
    step = max(_BATCH_VALUES // sampler.target, 1)
    for start in range(0, samples, step):
        indices = range(start, min(start + step, samples))
        tokens = [_sentences(sampler, i, sentence) for i in indices] if reads else None
        hits += contained(sampler.plans(indices, source, 0, tokens), sampler.target).sum(axis=0)
    p = hits / samples
    return Curve(p, np.sqrt(p * (1 - p) / samples), samples)


def _sentences(sampler: PoseSampler, index: int, mean: int) -> np.ndarray:
    """A window of tokens that end a sentence or do not, int64 [L]."""
    (end,) = sampler.boundaries
    ends = Draw(sampler.seed, 0, index, SENTENCES).integers(mean, sampler.window) == 0
    return np.where(ends, end, end + 1)


def contained(plans: SkipPlan, target: int) -> np.ndarray:
    """Whether each sample of a batch contains each distance, bool [B, T]."""
    if plans.lengths.shape[1] > 24:
        return _contained_by_autocorrelation(plans.positions(), target)
    rows = np.arange(len(plans.lengths))
    changes = np.zeros((len(rows), target + 1), dtype=np.int32)
    ends = plans.position_starts + plans.lengths
    for j in range(plans.lengths.shape[1]):
        for i in range(j + 1):
            there = ((plans.lengths[:, i] > 0) & (plans.lengths[:, j] > 0)).astype(np.int32)
            nearest = plans.position_starts[:, j] - ends[:, i] + 1 if i < j else np.zeros_like(rows)
            farthest = ends[:, j] - plans.position_starts[:, i] - 1
            nearest, farthest = nearest * there, farthest * there
            changes[rows, nearest] += there
            changes[rows, farthest + 1] -= there
    return np.cumsum(changes[:, :-1], axis=1) > 0


def _contained_by_autocorrelation(positions: np.ndarray, target: int) -> np.ndarray:
    present = np.zeros((len(positions), target))
    np.put_along_axis(present, positions, 1.0, axis=1)
    size = 1 << (2 * target - 1).bit_length()
    pairs = np.fft.irfft(np.abs(np.fft.rfft(present, size)) ** 2, size)[:, :target]
    return pairs > 0.5


def _formula(sampler: PoseSampler, source: int) -> np.ndarray | None:
    """Exact coverage of plain windows and of two chunks, [T]; None where no formula is known.

    With two chunks of l and L - l tokens and a skip u, distances below max(l, L - l) lie inside a
    chunk and those in [u + 1, u + L - 1] between the two, whatever l; l and u are independent.
    """
    window, target = sampler.window, sampler.target
    distances = np.arange(target)
    plain = (distances < window).astype(float)
    if sampler.target_schedule:
        return None
    if sampler.name == "full" or (sampler.name == "pose" and sampler.num_chunks == 1):
        return plain
    if sampler.name == "pose-reference":
        lengths = np.arange(1, (window + 1) // 2 + 1)
    elif sampler.name == "pose" and sampler.num_chunks == 2:
        lengths = np.arange(1, window)
    else:
        return None
    room = target - window
    if sampler.name == "pose" and sampler.content == "aligned":
        room = min(room, source - window)
    longer = np.sort(np.maximum(lengths, window - lengths))
    inside = 1 - np.searchsorted(longer, distances, side="right") / len(lengths)
    skips = np.minimum(distances - 1, room) - np.maximum(distances - window + 1, 0) + 1
    between = np.clip(skips, 0, None) / (room + 1)
    skipping = 1 - (1 - inside) * (1 - between)
    skipping[0] = 1.0
    return sampler.plain_fraction * plain + (1 - sampler.plain_fraction) * skipping
