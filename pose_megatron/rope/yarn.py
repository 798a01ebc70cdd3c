"""YaRN, as published and as PoSE's authors trained it; notation as in `interpolation`."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pose_megatron.errors import ConfigError
from pose_megatron.rope.interpolation import (
    Interpolation,
    Pairs,
    check_attention_factor,
    ramp_error,
)
from pose_megatron.rope.longrope import LongRope

_ROUNDING = 2.0**-24  # float32 rounds to nearest: by at most this share of a number


@dataclass(frozen=True)
class _NtkByParts(Interpolation):
    """What both YaRNs share: options, the ramp m_i and the temperature.

    m_i is 1 for pairs that turn at least beta_fast times inside L, 0 for those that turn at most
    beta_slow times, and linear in i between them ("NTK-by-parts", arXiv 2309.00071, 3.2).

    Over another scaling, pairs are not evenly spaced: m_i is then linear in the logarithm of the
    turns (for plain theta_i the same as linear in i), and `truncate` has no effect.
    """

    beta_fast: float = 32.0  # turns inside L from which a pair is kept
    beta_slow: float = 1.0  # turns inside L up to which a pair is fully interpolated
    attention_factor: float | None = None  # multiplies cos and sin; None: 0.1 ln s + 1
    truncate: bool = True  # round the ends of the ramp outwards to whole pairs

    reaches_factor_times_window = True
    _RAMP: ClassVar[tuple[str, ...]] = ("beta_fast", "beta_slow", "truncate")

    def __post_init__(self):
        super().__post_init__()
        if not self.beta_fast > self.beta_slow > 0:
            raise ConfigError(
                f"rope scaling needs beta_fast > beta_slow > 0, not {self.beta_fast} and "
                f"{self.beta_slow}"
            )
        if self.window <= 2 * math.pi * self.beta_slow:
            raise ConfigError(
                f"original_max_position_embeddings {self.window} is too short for rope scaling "
                f"{self.name!r}: no pair turns beta_slow = {self.beta_slow} times inside it"
            )
        check_attention_factor(self.attention_factor)

    def temperature(self) -> float:
        if self.attention_factor is not None:
            return float(self.attention_factor)
        return 0.1 * math.log(self.factor) + 1.0

    def kept(self, pairs: Pairs) -> Tensor:
        """m_i: float64 [rotary_dim / 2]."""
        return self.ramp(pairs).clamp(0, 1)

    def ramp(self, pairs: Pairs) -> Tensor:
        """m_i before it is held within [0, 1]."""
        if not pairs.plain:
            slow, fast = math.log(self.beta_slow), math.log(self.beta_fast)
            return (pairs.turns(self.window).log() - slow) / (fast - slow)
        dim = pairs.rotary_dim

        def pair_turning(times: float) -> float:  # solves L b^(-2i/d) = 2 pi times for i
            return dim * math.log(self.window / (2 * math.pi * times)) / (2 * math.log(pairs.base))

        first, last = pair_turning(self.beta_fast), pair_turning(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)  # d - 1, not d/2 - 1: YaRN's own clamp
        if first == last:
            last += 0.001
        return 1 - (torch.arange(dim // 2, dtype=torch.float64) - first) / (last - first)

    def _ramp(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._RAMP}


@dataclass(frozen=True)
class Yarn(_NtkByParts):
    """theta_i (m_i + (1 - m_i)/s), cos and sin times 0.1 ln s + 1: YaRN (arXiv 2309.00071)."""

    name = "yarn"
    hf_type = "yarn"
    hf_required = frozenset({"factor"})
    hf_optional = frozenset(
        {
            *("attention_factor", "mscale", "mscale_all_dim", *_NtkByParts._RAMP),
            *("finetuned", "attn_factor"),
        }
    )
    longrope_is_safer = True

    def stretch(self, pairs: Pairs, length: int | None = None) -> Tensor:
        kept = self.kept(pairs)
        return 1 / (kept + (1 - kept) / self.factor)

    def to_hf(self, pairs: Pairs, window: int) -> dict[str, Any]:
        given = self.attention_factor
        return {
            "factor": float(self.factor),
            "original_max_position_embeddings": self.window,
            **self._ramp(),
            **({} if given is None else {"attention_factor": float(given)}),
        }

    @classmethod
    def from_hf(cls, keys: dict[str, Any], window: int | None, base: float) -> dict[str, Any]:
        """DeepSeek spells the temperature as a ratio of two, when both are given."""
        if (times := keys.pop("attn_factor", 1.0)) != 1.0:
            raise ConfigError(
                f"config.json: yarn's attn_factor {times!r} means different models: vLLM multiplies"
                " 0.1 ln factor + 1 by it, transformers ignores it; remove it for transformers' "
                f"model, or write attention_factor "
                f"{times * (0.1 * math.log(max(keys['factor'], 1.0)) + 1):.6g} in its place for "
                "vLLM's"
            )
        top, bottom = keys.pop("mscale", None), keys.pop("mscale_all_dim", None)
        if not (top and bottom):
            return keys
        step = 0.1 * math.log(max(keys["factor"], 1.0))
        ratio = (step * top + 1) / (step * bottom + 1)
        if keys.setdefault("attention_factor", ratio) != ratio:
            raise ConfigError(
                "config.json contradicts itself: mscale / mscale_all_dim says attention_factor "
                f"{ratio!r}, another spelling {keys['attention_factor']!r}"
            )
        return keys

    def notes(self, window: int) -> list[str]:
        said = [
            "transformers 4.43 to 4.50 read yarn as if the extended window were the original one, "
            "4.51 to 4.54 leave out truncate and take T / L for the factor; for these export with "
            "--rope-as-longrope"
        ]
        if self.attention_factor is not None:
            said.append(
                "vLLM 0.19 and before leave out the attention_factor of yarn; for these, too, "
                "export with --rope-as-longrope"
            )
        return said

    def float32_error(self, pairs: Pairs) -> Tensor:
        """transformers computes r_i = 1 - m_i = (i - first) / (last - first) in float32.

        With `truncate` both ends are whole numbers, so only the quotient is rounded. Without it,
        both differences are rounded too, and before them `first`, whose rounding moves r_i by up to
        first / (last - first) roundings. For any b and d that ratio is
        ln(L / (2 pi beta_fast)) / ln(beta_fast / beta_slow), or below 1 where an end is clamped
        and a pair lies on the ramp.
        """
        roundings = 1.0
        if not self.truncate:
            turns = self.window / (2 * math.pi * self.beta_fast)
            roundings = 3 + max(math.log(turns) / math.log(self.beta_fast / self.beta_slow), 1.0)
        return ramp_error(self.ramp(pairs), roundings * _ROUNDING, self.factor)


@dataclass(frozen=True)
class YarnRevised(_NtkByParts):
    """theta_i / (m_i + (1 - m_i) s): what PoSE's authors trained as YaRN (arXiv 2309.10400).

    m_i and the temperature are YaRN's; blending wavelengths in place of frequencies makes the pairs
    on the ramp slower, up to 16 times for s = 64. Hugging Face has no such type: it is written as
    longrope, with the ramp beside the lists so that we read it back by its name.
    """

    name = "yarn_revised"
    hf_required = frozenset({"short_factor", "long_factor"})
    hf_optional = frozenset(
        {"factor", "attention_factor", "short_mscale", "long_mscale", *_NtkByParts._RAMP}
    )

    def stretch(self, pairs: Pairs, length: int | None = None) -> Tensor:
        kept = self.kept(pairs)
        return kept + (1 - kept) * self.factor

    def to_hf(self, pairs: Pairs, window: int) -> dict[str, Any]:
        return super().to_hf(pairs, window) | self._ramp()

    @classmethod
    def from_hf(cls, keys: dict[str, Any], window: int | None, base: float) -> dict[str, Any]:
        ramp = {name: keys.pop(name) for name in cls._RAMP if name in keys}
        lists = LongRope.from_hf(keys, window, base)
        short, long = lists.pop("short_factor"), lists.pop("long_factor")
        revised = cls(**lists, **ramp)
        for name, given in {"short_factor": short, "long_factor": long}.items():
            ours = revised.stretch(Pairs.unscaled(2 * len(given), base)).tolist()
            if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(ours, given, strict=True)):
                raise ConfigError(
                    f"config.json contradicts itself: the {name} of this longrope is not the ramp "
                    "of yarn_revised that its beta_fast and beta_slow describe"
                )
        return lists | ramp
