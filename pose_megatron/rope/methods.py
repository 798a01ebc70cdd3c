"""The interpolation methods, one class each; YaRN and LongRoPE stand in files of their own.

A new method is one class here and its name in METHODS, below. Flags, checks, export, import and
notes follow from the class. The notation (d, b, s, L, theta_i) is explained in `interpolation`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pose_megatron.errors import ConfigError
from pose_megatron.rope.interpolation import Interpolation, Pairs, ramp_error
from pose_megatron.rope.longrope import LongRope
from pose_megatron.rope.yarn import Yarn, YarnRevised


@dataclass(frozen=True)
class Unscaled(Interpolation):
    """Plain rope: theta_i (RoFormer, arXiv 2104.09864)."""

    name = "none"
    needs_window = False
    extends_scaled = False
    hf_type = "default"
    hf_required = frozenset()

    def __post_init__(self):
        super().__post_init__()
        if self.factor != 1:
            raise ConfigError(
                f"rope scaling 'none' with factor {self.factor} contradicts itself: choose one of "
                f"{', '.join(name for name in METHODS if name != self.name)}, or factor 1"
            )

    def stretch(self, pairs: Pairs, length: int | None = None) -> float:
        return self.factor

    def to_hf(self, pairs: Pairs, window: int) -> dict[str, Any]:
        return {}

    @classmethod
    def from_hf(cls, keys: dict[str, Any], window: int | None, base: float) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Linear(Interpolation):
    """theta_i / s: position interpolation (arXiv 2306.15595)."""

    name = "linear"
    needs_window = False
    reaches_factor_times_window = True
    hf_type = "linear"
    hf_required = frozenset({"factor"})

    def stretch(self, pairs: Pairs, length: int | None = None) -> float:
        return self.factor

    def notes(self, window: int) -> list[str]:
        return [
            "vLLM multiplies the window by the factor of linear interpolation; start it with "
            f"--max-model-len {window}"
        ]

    def to_megatron(self, pairs: Pairs) -> dict[str, Any]:
        return {"rotary_seq_len_interpolation_factor": self.factor}


@dataclass(frozen=True)
class Ntk(Interpolation):
    """theta_i / s^(2i/(d-2)), NTK-aware interpolation (bloc97 2023; YaRN, arXiv 2309.00071, 3.1).

    Plain rope with base b s^(d/(d-2)): the fastest pair is unchanged, the slowest divided by s.
    """

    name = "ntk"
    needs_window = False
    reaches_factor_times_window = True
    hf_type = "default"  # with the other base; it is read back as plain rope

    def stretch(self, pairs: Pairs, length: int | None = None) -> Tensor:
        return _ntk_stretch(pairs, self.factor)

    def to_hf(self, pairs: Pairs, window: int) -> dict[str, Any]:
        return {"rope_theta": ntk_base(pairs.rotary_dim, pairs.base, self.factor)}

    def to_megatron(self, pairs: Pairs) -> dict[str, Any]:
        return {"rotary_base": ntk_base(pairs.rotary_dim, pairs.base, self.factor)}


def ntk_base(rotary_dim: int, base: float, factor: float) -> float:
    """The base whose plain embedding is that of method ntk."""
    if rotary_dim < 4:
        raise ConfigError(f"rope scaling 'ntk' needs at least 4 rotated channels, not {rotary_dim}")
    return base * factor ** (rotary_dim / (rotary_dim - 2))


def _ntk_stretch(pairs: Pairs, factor: float) -> Tensor:
    dim = pairs.rotary_dim
    per_pair = ntk_base(dim, pairs.base, factor) / pairs.base  # to the powers 0 .. (d-2)/d
    return per_pair ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)


@dataclass(frozen=True)
class Llama3(Interpolation):
    """theta_i (k_i + (1 - k_i)/s): Llama 3.1 (arXiv 2407.21783; Meta's `use_scaled_rope`).

    k_i is 1 for pairs that turn at least high_freq_factor times inside L, 0 for those that turn at
    most low_freq_factor times, and linear in the turns between them.
    """

    low_freq_factor: float = 1.0  # turns inside L up to which a pair is interpolated
    high_freq_factor: float = 4.0  # turns inside L from which a pair is kept

    name = "llama3"
    hf_type = "llama3"
    hf_required = frozenset({"factor", "low_freq_factor", "high_freq_factor"})

    def __post_init__(self):
        super().__post_init__()
        if not self.high_freq_factor > self.low_freq_factor > 0:
            raise ConfigError(
                "rope scaling needs high_freq_factor > low_freq_factor > 0, not "
                f"{self.high_freq_factor} and {self.low_freq_factor}"
            )

    def stretch(self, pairs: Pairs, length: int | None = None) -> Tensor:
        kept = self._ramp(pairs).clamp(0, 1)
        return 1 / (kept + (1 - kept) / self.factor)

    def to_hf(self, pairs: Pairs, window: int) -> dict[str, Any]:
        return {
            "factor": float(self.factor),
            "low_freq_factor": float(self.low_freq_factor),
            "high_freq_factor": float(self.high_freq_factor),
            "original_max_position_embeddings": self.window,
        }

    def notes(self, window: int) -> list[str]:
        said = [
            "llama.cpp computes llama3 for LLaMA, Mistral and Mixtral alone, and plain rope for "
            "other families"
        ]
        if self.window != 8192:
            said.append(
                f"llama.cpp takes 8192 for the window before llama3, which here is {self.window}, "
                "and would compute another rope; do not convert it to GGUF"
            )
        return said

    def float32_error(self, pairs: Pairs) -> Tensor:
        """transformers counts the turns in float32: they are off by up to 8e-7 of themselves, from
        the exponent's rounding (2^-25 ln b = 5e-7 for b = 10^7) and five others (6e-8 each).

        On the ramp there are at most high_freq_factor turns, and k_i is off by their error over
        high_freq_factor - low_freq_factor.
        """
        low, high = self.low_freq_factor, self.high_freq_factor
        return ramp_error(self._ramp(pairs), 8e-7 * high / (high - low), self.factor)

    def _ramp(self, pairs: Pairs) -> Tensor:
        """k_i before it is held within [0, 1]."""
        low, high = self.low_freq_factor, self.high_freq_factor
        return (pairs.turns(self.window) - low) / (high - low)

    def to_megatron(self, pairs: Pairs) -> dict[str, Any]:
        if self != Llama3(self.factor, 8192):  # the only window and ramp that Megatron-LM has
            return {}
        return {"use_rope_scaling": True, "rope_scaling_factor": self.factor}


@dataclass(frozen=True)
class Dynamic(Interpolation):
    """ntk with s n/L - (s - 1) in place of s, n the sequence's length, and plain rope up to L:
    transformers' `dynamic` (emozilla 2023; YaRN, arXiv 2309.00071, 3.3). Read and exported only.
    """

    name = "dynamic"
    extends_scaled = False
    trains = False
    keeps_window = True
    hf_type = "dynamic"
    hf_required = frozenset({"factor"})

    @property
    def depends_on_length(self) -> bool:
        return True

    def stretch(self, pairs: Pairs, length: int | None = None) -> Tensor:
        if length is None:
            raise ConfigError(
                "rope scaling 'dynamic' has no frequencies to train with: transformers computes "
                "them anew for every sequence length; train with ntk, whose frequencies are those "
                "of one length"
            )
        return _ntk_stretch(pairs, max(self.factor * length / self.window - (self.factor - 1), 1.0))

    @classmethod
    def from_hf(cls, keys: dict[str, Any], window: int | None, base: float) -> dict[str, Any]:
        original = keys["original_max_position_embeddings"]
        if original not in (None, window):
            raise ConfigError(
                f"config.json contradicts itself: original_max_position_embeddings {original}; "
                f"dynamic takes max_position_embeddings, which is {window}, for it"
            )
        return keys | {"original_max_position_embeddings": window}

    def notes(self, window: int) -> list[str]:
        return [
            "vLLM 0.19 and before fix the frequencies of dynamic at its largest window, 0.33 does "
            "not interpolate it at all",
            "llama.cpp does not interpolate dynamic",
        ]


# Their names stand in `names`, in the same order, for those who must not wait for torch.
METHODS: dict[str, type[Interpolation]] = {
    method.name: method
    for method in (Unscaled, Linear, Ntk, Yarn, YarnRevised, Llama3, LongRope, Dynamic)
}
