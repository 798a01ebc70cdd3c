"""Where a sample's tokens come from and which positions they claim.

A plan is a pure function of (seed, epoch, index) and, for samplers that start chunks after certain
tokens, of the window's tokens: no global state, no dependence on ranks, workers or restarts
(`draws.py`). The laws are in `laws.py`; what holds for all of them is here: checked settings, a
share of plain samples, a target that grows, one sample or a batch.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from pose_megatron.errors import ConfigError
from pose_megatron.positions.draws import COINS, Draw, Drawing, Draws, Integers
from pose_megatron.positions.laws import CONTENTS, SAMPLERS, SKIP_LAWS, SkipPlan


@dataclass(frozen=True)
class PoseSampler:
    """Draws the plan of each sample.

    Attributes:
        window: L, tokens of a sample.
        target: T; positions lie in [0, T).
        name: a key of SAMPLERS.
        num_chunks: N, for `pose` and `pose-boundary`.
        content: how `pose` draws the text skips v, one of CONTENTS; `cream` heeds contiguous.
        seed: non-negative, below 2**64.
        skip_law: how `pose` and `pose-boundary` draw the position skips u, one of SKIP_LAWS.
        boundaries: token ids after which a chunk may start, for samplers that read tokens.
        plain_fraction: share of samples with plain positions and contiguous text, in [0, 1].
        target_schedule: (first sample, target) pairs, ascending in both, from sample 0 on and up
            to T: the target grows as the run goes on. Empty: T throughout.

    Raises:
        ConfigError: settings that cannot be; names the flag, its value and the way out.
    """

    window: int
    target: int
    name: str = "pose"
    num_chunks: int = 2
    content: str = "uniform"
    seed: int = 1234
    skip_law: str = "chain"
    boundaries: tuple[int, ...] = ()
    plain_fraction: float = 0.0
    target_schedule: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        for flag, value, known in (
            ("--position-sampler", self.name, SAMPLERS),
            ("--pose-content", self.content, CONTENTS),
            ("--pose-skip-law", self.skip_law, SKIP_LAWS),
        ):
            if value not in known:
                raise ConfigError(f"{flag} {value} is none of {', '.join(known)}")
        least = SAMPLERS[self.name].min_window
        if self.window < least:
            raise ConfigError(f"--seq-length must be at least {least}, not {self.window}")
        if self.window > self.target:
            raise ConfigError(
                f"--seq-length {self.window} (the window L) is greater than "
                f"--max-position-embeddings {self.target} (the target T); raise the latter"
            )
        if SAMPLERS[self.name].in_chunks and not 1 <= self.num_chunks <= self.window:
            raise ConfigError(
                f"--pose-num-chunks {self.num_chunks} must lie between 1 and --seq-length "
                f"{self.window}: every chunk has at least one token"
            )
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"--seed {self.seed} must lie in [0, 2**64)")
        if self.reads_tokens and not self.boundaries:
            raise ConfigError(
                f"--position-sampler {self.name} cuts at tokens: name them with --pose-boundaries"
            )
        if not 0 <= self.plain_fraction <= 1:
            raise ConfigError(f"--pose-plain-fraction {self.plain_fraction} must lie in [0, 1]")
        self._check_schedule()

    def _check_schedule(self) -> None:
        if not self.target_schedule:
            return
        firsts, targets = zip(*self.target_schedule, strict=True)
        written = " ".join(f"{first}:{target}" for first, target in self.target_schedule)
        if firsts[0] != 0 or list(firsts) != sorted(set(firsts)):
            raise ConfigError(
                f"--pose-target-schedule {written}: sample numbers must start at 0 and ascend"
            )
        if (
            list(targets) != sorted(set(targets))
            or targets[0] < self.window
            or (targets[-1] != self.target)
        ):
            raise ConfigError(
                f"--pose-target-schedule {written}: targets must ascend from --seq-length "
                f"{self.window} or more to --max-position-embeddings {self.target}"
            )

    def describe(self) -> str:
        """The sampler and its sizes, in words for a person."""
        words = [self.name, f"window L = {self.window}", f"target T = {self.target}"]
        if SAMPLERS[self.name].in_chunks:
            words.append(f"{self.num_chunks} chunks")
        if self.name == "pose":
            words.append(f"{self.content} text")
        if SAMPLERS[self.name].in_chunks and self.skip_law != "chain":
            words.append(f"{self.skip_law} skips")
        if self.plain_fraction:
            words.append(f"{self.plain_fraction:.0%} plain samples")
        if self.target_schedule:
            words.append(f"growing from T = {self.target_schedule[0][1]}")
        return ", ".join(words)

    @property
    def reads_tokens(self) -> bool:
        """Whether `plan` needs the window's tokens."""
        return SAMPLERS[self.name].reads_tokens

    @overload
    def target_at(self, index: int) -> int: ...
    @overload
    def target_at(self, index: np.ndarray) -> np.ndarray | int: ...
    def target_at(self, index):
        """T at sample `index`, or at each of int64 [B]; one int where it does not grow."""
        if not self.target_schedule:
            return self.target
        firsts, targets = zip(*self.target_schedule, strict=True)
        if isinstance(index, int):
            return targets[bisect_right(firsts, index) - 1]
        return np.array(targets)[np.searchsorted(firsts, index, side="right") - 1]

    def plan(
        self, index: int, source: int, epoch: int = 0, tokens: np.ndarray | None = None
    ) -> SkipPlan:
        """Sample `index`'s plan in an epoch, over a source of `source` tokens.

        Args:
            tokens: the source's first L tokens, for samplers that read them.

        Raises:
            ConfigError: the source is shorter than the window, or tokens are needed and missing.
        """
        index, source = int(index), int(source)  # numpy's would overflow in a Draw
        if source < self.window:
            raise ConfigError(
                f"sample {index}: its source has {source} tokens, fewer than --seq-length "
                f"{self.window}"
            )
        starts = self._chunk_starts(tokens) if self.reads_tokens else None
        draw = Draw(self.seed, epoch, index)
        plan = SAMPLERS[self.name].law(draw, self, self.target_at(index), source, starts)
        if self.plain_fraction and self._plain(Draw(self.seed, epoch, index, COINS)):
            return plan.plain()
        return plan

    def plans(
        self,
        indices: Sequence[int],
        sources: Sequence[int] | int,
        epoch: int = 0,
        tokens: Sequence[np.ndarray] | None = None,
    ) -> SkipPlan:
        """The plans of B samples at once, each as `plan` gives it; int64 [B, N].

        Args:
            sources: tokens of each sample's source, or of everyone's.
            tokens: the first L tokens of each source, for samplers that read them.

        Raises:
            ConfigError: a source is shorter than the window, or tokens are needed and missing.
        """
        index = np.asarray(indices, dtype=np.int64)
        source = np.broadcast_to(np.asarray(sources, dtype=np.int64), index.shape)
        if not SAMPLERS[self.name].in_batches or (source < self.window).any():
            return self._one_by_one(index, source, epoch, tokens)
        draws = Draws(self.seed, epoch, index)
        plan = SAMPLERS[self.name].law(draws, self, self.target_at(index), source, None)
        plan = SkipPlan(*(np.broadcast_to(a, (len(index), a.shape[-1])) for a in plan))
        if self.plain_fraction:
            plain = np.reshape(self._plain(Draws(self.seed, epoch, index, COINS)), (-1, 1))
            both = zip(plan.plain(), plan, strict=True)
            plan = SkipPlan(*(np.where(plain, without, skips) for without, skips in both))
        return plan

    def _one_by_one(
        self,
        indices: np.ndarray,
        sources: np.ndarray,
        epoch: int,
        tokens: Sequence[np.ndarray] | None,
    ) -> SkipPlan:
        rows = [
            self.plan(index, source, epoch, None if tokens is None else tokens[i])
            for i, (index, source) in enumerate(
                zip(indices.tolist(), sources.tolist(), strict=True)
            )
        ]
        width = max((len(row.lengths) for row in rows), default=0)

        def padded(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
            table = np.zeros((len(rows), width), dtype=np.int64)
            for row, array in zip(table, arrays, strict=True):
                row[: len(array)] = array
            return table

        return SkipPlan(*(padded(arrays) for arrays in zip(*rows, strict=True)))

    def _plain(self, coin: Drawing[Integers]) -> Integers | bool:
        """Whether the sample, or each sample of a batch, is a plain one."""
        return coin.integer(0, 2**32 - 1) < int(self.plain_fraction * 2**32)

    def _chunk_starts(self, tokens: np.ndarray | None) -> np.ndarray:
        """Indices of the window right after a boundary token."""
        if tokens is None:
            raise ConfigError(
                f"--position-sampler {self.name} cuts at tokens: give it the window's"
            )
        return np.flatnonzero(np.isin(tokens[: self.window - 1], self.boundaries)) + 1
