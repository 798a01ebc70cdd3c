"""Where a sample's tokens come from and which positions they claim.

A plan is a pure function of (seed, epoch, index) and, for samplers that cut where the text says so,
of the window's tokens: no global state, no dependence on ranks, workers or restarts (`draws.py`).
By which law is the registry's business (`samplers.py`); what holds for every law is here: checked
settings, a share of plain samples, a target that grows, one sample or a batch.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pose_megatron.errors import ConfigError
from pose_megatron.positions.draws import COINS, Draw, Draws
from pose_megatron.positions.laws import CONTENTS, SAMPLERS, SKIP_LAWS, SkipPlan


@dataclass(frozen=True)
class PoseSampler:
    """Draws the plan of each sample.

    Attributes:
        window: L, tokens of a sample.
        target: T; positions lie in [0, T).
        name: a key of SAMPLERS.
        num_chunks: N, for samplers in chunks (`pose`, `pose-boundary`).
        content: rule for v, one of CONTENTS, for `pose`; `cream` heeds contiguous.
        seed: non-negative, below 2**64.
        skip_law: rule for u, one of SKIP_LAWS, for samplers in chunks.
        boundaries: token ids after which a chunk may start, for samplers that read tokens.
        plain_fraction: share of samples with plain positions and contiguous text, in [0, 1].
        target_schedule: (first sample, target) pairs, ascending in both, from sample 0 on and up
            to T: the target grows as the run goes on. Empty: T throughout.

    Raises:
        ConfigError: naming the flag, its value and the way out.
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
        """Law and sizes, for people."""
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
        """Whether `plan` wants the window's tokens."""
        return SAMPLERS[self.name].reads_tokens

    def target_at(self, index):
        """The target of sample `index`: int, or int64 [B] for [B]."""
        if not self.target_schedule:
            return self.target
        firsts, targets = zip(*self.target_schedule, strict=True)
        if isinstance(index, int):
            return targets[bisect_right(firsts, index) - 1]
        return np.array(targets)[np.searchsorted(firsts, index, side="right") - 1]

    def plan(
        self, index: int, source: int, epoch: int = 0, tokens: np.ndarray | None = None
    ) -> SkipPlan:
        """The plan of sample `index` of `epoch`, over a source of `source` tokens.

        Args:
            tokens: the source's first L tokens, where `reads_tokens`.

        Raises:
            ConfigError: the source is shorter than the window, or tokens are wanted and missing.
        """
        index, source = int(index), int(source)  # numpy's would overflow in a Draw
        if source < self.window:
            raise ConfigError(
                f"sample {index}: its source has {source} tokens, fewer than --seq-length "
                f"{self.window}"
            )
        cuts = self._cuts(tokens) if self.reads_tokens else None
        draw = Draw(self.seed, epoch, index)
        plan = SAMPLERS[self.name].law(draw, self, self.target_at(index), source, cuts)
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
        """The plans of B samples at once, each the one that `plan` gives; int64 [B, N].

        Args:
            sources: of each sample, or of all.
            tokens: of each sample, where `reads_tokens`.

        Raises:
            ConfigError: a source is shorter than the window.
        """
        indices = np.asarray(indices, dtype=np.int64)
        sources = np.broadcast_to(np.asarray(sources, dtype=np.int64), indices.shape)
        if not SAMPLERS[self.name].in_batches or (sources < self.window).any():
            rows = [
                self.plan(index, source, epoch, None if tokens is None else tokens[i])
                for i, (index, source) in enumerate(
                    zip(indices.tolist(), sources.tolist(), strict=True)
                )
            ]
            width = max((len(row.lengths) for row in rows), default=0)
            return SkipPlan(
                *(
                    np.array(
                        [np.pad(values, (0, width - len(values))) for values in field],
                        dtype=np.int64,
                    ).reshape(len(rows), width)
                    for field in zip(*rows, strict=True)
                )
            )
        law = SAMPLERS[self.name].law
        plan = law(Draws(self.seed, epoch, indices), self, self.target_at(indices), sources, None)
        plan = SkipPlan(*(np.broadcast_to(a, (len(indices), a.shape[-1])) for a in plan))
        if self.plain_fraction:
            coins = self._plain(Draws(self.seed, epoch, indices, COINS))[:, None]
            plan = SkipPlan(
                *(
                    np.where(coins, flat, skipped)
                    for flat, skipped in zip(plan.plain(), plan, strict=True)
                )
            )
        return plan

    def _plain(self, draw):
        return draw.integer(0, 2**32 - 1) < int(self.plain_fraction * 2**32)

    def _cuts(self, tokens: np.ndarray | None) -> np.ndarray:
        if tokens is None:
            raise ConfigError(
                f"--position-sampler {self.name} cuts at tokens: give it the window's"
            )
        return np.flatnonzero(np.isin(tokens[: self.window - 1], self.boundaries)) + 1
