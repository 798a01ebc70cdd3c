"""LongRoPE: frequencies divided by given lists; notation as in `interpolation`."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pose_megatron.errors import ConfigError
from pose_megatron.rope.interpolation import (
    Interpolation,
    Pairs,
    check_attention_factor,
    is_number,
    longrope_keys,
)


@dataclass(frozen=True)
class LongRope(Interpolation):
    """theta_i / f_i with f_i given, cos and sin times sqrt(1 + ln s / ln L): LongRoPE
    (arXiv 2402.13753; the temperature as in Phi-3's code).

    There is one list for sequences up to L and one for longer ones. Training uses the long one.
    """

    short_factor: tuple[float, ...] | None = None  # f_i up to L, d/2 of them; None: the long ones
    long_factor: tuple[float, ...] | None = None  # f_i beyond L, d/2 of them
    attention_factor: float | None = None  # multiplies cos and sin; None: the formula above

    name = "longrope"
    extends_scaled = False
    hf_required = frozenset({"short_factor", "long_factor"})
    hf_optional = frozenset({"factor", "attention_factor", "short_mscale", "long_mscale"})

    def __post_init__(self):
        for name in ("short_factor", "long_factor"):  # lists in files
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.short_factor is None:
            object.__setattr__(self, "short_factor", self.long_factor)
        super().__post_init__()
        for name in ("long_factor", "short_factor"):
            given = getattr(self, name)
            if not given or not isinstance(given, tuple):
                raise ConfigError(
                    f"rope scaling 'longrope' needs {name}, a list with one number per rotated "
                    f"pair (--rope-scaling-config), not {given}"
                )
            for value in given:
                if not (is_number(value) and value > 0):
                    raise ConfigError(f"rope scaling {name} holds {value!r}, no number above 0")
        short, long = self._lists()
        if len(short) != len(long):
            raise ConfigError(
                f"rope scaling short_factor has {len(short)} numbers, long_factor {len(long)}: "
                "both need one per rotated pair"
            )
        if self.attention_factor is None and self.window < 2:
            raise ConfigError("rope scaling 'longrope' from a window of 1 needs attention_factor")
        check_attention_factor(self.attention_factor)

    def _lists(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        assert self.short_factor is not None and self.long_factor is not None
        return self.short_factor, self.long_factor

    @property
    def depends_on_length(self) -> bool:
        return self.short_factor != self.long_factor

    def stretch(self, pairs: Pairs, length: int | None = None) -> Tensor:
        short, long = self._lists()
        given = short if length is not None and length <= self.window else long
        if len(given) != len(pairs.frequencies):
            raise ConfigError(
                f"rope scaling 'longrope' has {len(given)} factors; {pairs.rotary_dim} rotated "
                f"channels need {len(pairs.frequencies)}"
            )
        return torch.tensor(given, dtype=torch.float64)

    def temperature(self) -> float:
        if self.attention_factor is not None:
            return float(self.attention_factor)
        return math.sqrt(1 + math.log(self.factor) / math.log(self.window))

    def to_hf(self, pairs: Pairs, window: int) -> dict[str, Any]:
        short, long = map(list, self._lists())
        return longrope_keys(self.factor, self.window, long, self.temperature(), short)

    @classmethod
    def from_hf(cls, keys: dict[str, Any], window: int | None, base: float) -> dict[str, Any]:
        """vLLM's two mscales must say what attention_factor says; transformers derives a missing
        factor from the windows."""
        original = keys["original_max_position_embeddings"]
        if "factor" not in keys:
            if original is None or window is None:
                raise ConfigError(
                    "config.json: rope_type 'longrope' needs factor, which is missing"
                )
            keys["factor"] = max(window / original, 1.0)
        spelt = {name: keys.pop(name) for name in ("short_mscale", "long_mscale") if name in keys}
        temperature = cls(**keys).temperature()
        for name, value in spelt.items():
            if value != temperature:
                raise ConfigError(
                    f"config.json contradicts itself: longrope {name} is {value} and "
                    f"attention_factor {temperature}"
                )
        return keys

    def notes(self, window: int) -> list[str]:
        said = super().notes(window)
        if self.depends_on_length:
            said.append(
                "two lists: transformers takes the short one for sequences up to "
                f"{self.window} tokens (transformers 4 from 4.51 on), vLLM one list for all "
                "sequences"
            )
        return said
