"""Rotary position embedding: inverse frequencies, attention factor, angles.

One formula, one home: training takes its angles from here, and export (rope_config) writes the same
numbers as keys that transformers and vLLM read, so both see one embedding.

Notation: d = rotary_dim, b = base, s = scaling.factor, L = original_max_position_embeddings, T the
extended window. Pair i of d/2 turns by theta_i = b^(-2i/d) radians per position.

    none          theta_i
    linear        theta_i / s                       position interpolation (arXiv 2306.15595)
    ntk           theta_i / s^(2i/(d-2))            base b s^(d/(d-2)): fastest pair unchanged,
                                                    slowest divided by s
    yarn          theta_i (m_i + (1 - m_i)/s)       YaRN (arXiv 2309.00071, NTK-by-parts)
    yarn_revised  theta_i / (m_i + (1 - m_i) s)     what PoSE's authors trained (arXiv 2309.10400)
    llama3        theta_i (k_i + (1 - k_i)/s)       Llama 3.1 (arXiv 2407.21783)
    longrope      theta_i / f_i                     LongRoPE (arXiv 2402.13753), f_i given: a long
                                                    list, and a short one for sequences up to L
    dynamic       ntk with s n/L - (s - 1) for s    n = the sequence's length, plain up to L

m_i goes from 1 (kept: the pair turns at least beta_fast times inside L) to 0 (interpolated: at most
beta_slow times), linearly in i; k_i from high_freq_factor to low_freq_factor turns, linearly in the
turns. The YaRNs multiply cos and sin by 0.1 ln s + 1, longrope by sqrt(1 + ln s / ln L).

A scaling may lie `over` another, that of the model before this extension: theta_i above is then
what the other gives, and attention factors multiply. Pairs are no longer evenly spaced, so m_i is
linear in the logarithm of the turns, which for plain theta_i is the same.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pose_megatron.errors import ConfigError

METHODS = ("none", "linear", "ntk", "yarn", "yarn_revised", "llama3", "longrope", "dynamic")
_YARN = ("yarn", "yarn_revised")
_RAMP = {"beta_fast", "beta_slow", "truncate", "attention_factor"}
_OPTIONS = {  # by method: the fields that concern it, beside the factor and the original window
    "none": set(),
    "linear": set(),
    "ntk": set(),
    "yarn": _RAMP,
    "yarn_revised": _RAMP,
    "llama3": {"low_freq_factor", "high_freq_factor"},
    "longrope": {"short_factor", "long_factor", "attention_factor"},
    "dynamic": set(),
}


@dataclass(frozen=True)
class RopeScaling:
    """How the embedding is stretched from L to T positions; ValueError when inconsistent."""

    method: str = "none"  # one of METHODS
    factor: float = 1.0  # s >= 1, usually T / L
    original_max_position_embeddings: int | None = None  # L in tokens; linear and ntk do without
    beta_fast: float = 32.0  # YaRNs: turns inside L from which a pair is kept
    beta_slow: float = 1.0  # YaRNs: turns inside L up to which a pair is fully interpolated
    attention_factor: float | None = None  # YaRNs, longrope; None: the formula above
    truncate: bool = True  # YaRNs: round the ends of the ramp outwards to whole pairs
    low_freq_factor: float = 1.0  # llama3: turns inside L up to which a pair is interpolated
    high_freq_factor: float = 4.0  # llama3: turns inside L from which a pair is kept
    short_factor: tuple[float, ...] | None = None  # longrope: f_i up to L; None: the long ones
    long_factor: tuple[float, ...] | None = None  # longrope: f_i beyond L, d/2 of them
    over: "RopeScaling | None" = None  # the scaling that this one extends

    def __post_init__(self):
        if self.method not in METHODS:
            raise ConfigError(
                f"rope scaling method {self.method!r} is not one of {', '.join(METHODS)}"
            )
        for name in ("short_factor", "long_factor"):  # stored as lists in files
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.method == "longrope" and self.short_factor is None:
            object.__setattr__(self, "short_factor", self.long_factor)
        if isinstance(self.over, dict):
            object.__setattr__(self, "over", RopeScaling(**self.over))
        self._check_types()
        self._check_factor()
        self._check_window()
        for field in fields(self):
            value = getattr(self, field.name)
            known = [name for name, options in _OPTIONS.items() if field.name in options]
            if known and self.method not in known and value != field.default:
                raise ConfigError(
                    f"rope scaling {self.method!r} has no {field.name}; remove {value} or choose "
                    f"{' or '.join(known)}"
                )
        if self.method in _YARN:
            self._check_ramp("beta_slow", "beta_fast")
        if self.method == "llama3":
            self._check_ramp("low_freq_factor", "high_freq_factor")
        if self.method == "longrope":
            self._check_lists()
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ConfigError(f"rope scaling attention_factor {self.attention_factor} must be > 0")
        if self.over is not None:
            self._check_over()

    @property
    def depends_on_length(self) -> bool:
        """Whether short sequences have other frequencies than long ones."""
        return self.method == "dynamic" or self.short_factor != self.long_factor

    def __str__(self) -> str:
        window = self.original_max_position_embeddings if self.factor > 1 else None
        text = f"{self.method} x{self.factor:g}" + (f" from {window}" if window else "")
        return text if self.over is None else f"{text} over {self.over}"

    def _check_types(self):
        for name in (
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
        ):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise ConfigError(f"rope scaling {name} {value!r} must be a finite number")
        if not isinstance(self.truncate, bool):
            raise ConfigError(f"rope scaling truncate {self.truncate!r} must be true or false")

    def _check_factor(self):
        if self.factor < 1:
            raise ConfigError(f"rope scaling factor {self.factor} must be at least 1")
        if self.method == "none" and self.factor != 1:
            raise ConfigError(
                f"rope scaling 'none' with factor {self.factor} contradicts itself: choose one of "
                f"{', '.join(METHODS[1:])}, or factor 1"
            )

    def _check_window(self):
        original = self.original_max_position_embeddings
        if original is not None and (not isinstance(original, int) or original < 1):
            raise ConfigError(
                f"original_max_position_embeddings {original} must be a whole number >= 1"
            )
        if original is None and self.method not in ("none", "linear", "ntk"):
            raise ConfigError(
                f"rope scaling {self.method!r} needs original_max_position_embeddings "
                "(--original-max-position-embeddings), the window the model was pretrained on"
            )

    def _check_ramp(self, low: str, high: str):
        if not getattr(self, high) > getattr(self, low) > 0:
            raise ConfigError(
                f"rope scaling needs {high} > {low} > 0, not {getattr(self, high)} and "
                f"{getattr(self, low)}"
            )
        original = self.original_max_position_embeddings
        if self.method in _YARN and original <= 2 * math.pi * self.beta_slow:
            raise ConfigError(
                f"original_max_position_embeddings {original} is too short for rope scaling "
                f"{self.method!r}: no pair turns beta_slow = {self.beta_slow} times inside it"
            )

    def _check_lists(self):
        for name in ("long_factor", "short_factor"):
            given = getattr(self, name)
            if not given or not isinstance(given, tuple):
                raise ConfigError(
                    f"rope scaling 'longrope' needs {name}, a list with one number per rotated "
                    f"pair (--rope-scaling-config), not {given}"
                )
            for value in given:
                if not (_is_number(value) and value > 0):
                    raise ConfigError(f"rope scaling {name} holds {value!r}, no number above 0")
        if len(self.short_factor) != len(self.long_factor):
            raise ConfigError(
                f"rope scaling short_factor has {len(self.short_factor)} numbers, long_factor "
                f"{len(self.long_factor)}: both need one per rotated pair"
            )
        if self.attention_factor is None and self.original_max_position_embeddings < 2:
            raise ConfigError("rope scaling 'longrope' from a window of 1 needs attention_factor")

    def _check_over(self):
        if self.method in ("none", "longrope", "dynamic"):
            raise ConfigError(
                f"rope scaling {self.method!r} cannot extend a model that is already scaled with "
                f"{self.over.method!r}: choose linear, ntk, yarn, yarn_revised or llama3"
            )
        if self.over.depends_on_length:
            raise ConfigError(
                f"rope scaling {self.over.method!r} cannot be extended: its frequencies change "
                "with the sequence's length"
            )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def inverse_frequencies(
    rotary_dim: int, base: float, scaling: RopeScaling, length: int | None = None
) -> Tensor:
    """Radians per position of each rotated pair: float64 [rotary_dim / 2], on the CPU.

    Args:
        rotary_dim: rotated channels of a head (kv_channels x rotary_percent).
        length: of the sequence (its largest position + 1), on which dynamic and a longrope of two
            lists depend; None for what training uses, the long list.

    Raises:
        ConfigError: `rotary_dim` is odd, `base` not above 1, a list of another length than
            rotary_dim / 2, or `dynamic` without a length.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(f"{rotary_dim} rotated channels per head: rope needs an even number >= 2")
    if not (math.isfinite(base) and base > 1):
        raise ConfigError(f"rotary base {base} must be a finite number above 1")
    if scaling.over is None:
        pairs = torch.arange(0, rotary_dim, 2, dtype=torch.float64)
        before = float(base) ** (-pairs / rotary_dim)
    else:
        before = inverse_frequencies(rotary_dim, base, scaling.over)
    return before / _stretch(before, rotary_dim, base, scaling, length)


def attention_factor(scaling: RopeScaling) -> float:
    """Multiplies cos and sin, and so the attention logits by its square; 1.0 for most methods."""
    before = 1.0 if scaling.over is None else attention_factor(scaling.over)
    if scaling.attention_factor is not None:
        return before * float(scaling.attention_factor)
    if scaling.method in _YARN:
        return before * (0.1 * math.log(scaling.factor) + 1.0)
    if scaling.method == "longrope":
        original = scaling.original_max_position_embeddings
        return math.sqrt(1 + math.log(scaling.factor) / math.log(original))
    return before


def angles(position_ids: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotary angles at any positions, whole or not: [b, s] -> float32 [s, b, 1, rotary_dim].

    The halves (f, f) are what megatron-core's unfused, non-interleaved rotary takes. The product is
    elementwise in float64 (a matmul would meet TF32) and is brought into [-pi, pi] before the cast:
    the error stays below 2e-7 radians up to position 10^6, where a float32 product is off by 6e-2.
    """
    turn = 2 * math.pi
    inv_freq = inv_freq.to(position_ids.device, torch.float64)
    product = position_ids.t().double()[..., None, None] * inv_freq
    half = (product - turn * torch.round(product / turn)).float()
    return torch.cat((half, half), dim=-1)


def ntk_base(rotary_dim: int, base: float, factor: float) -> float:
    """The base whose plain embedding is that of method ntk."""
    if rotary_dim < 4:
        raise ConfigError(f"rope scaling 'ntk' needs at least 4 rotated channels, not {rotary_dim}")
    return base * factor ** (rotary_dim / (rotary_dim - 2))


def _stretch(
    before: Tensor, rotary_dim: int, base: float, scaling: RopeScaling, length: int | None
) -> Tensor | float:
    """By what each pair's frequency is divided: float64 [rotary_dim / 2], or one number."""
    method, factor = scaling.method, scaling.factor
    original = scaling.original_max_position_embeddings
    if method in ("none", "linear"):
        return factor
    if method == "longrope":
        short = length is not None and length <= original
        given = scaling.short_factor if short else scaling.long_factor
        if len(given) != rotary_dim // 2:
            raise ConfigError(
                f"rope scaling 'longrope' has {len(given)} factors; {rotary_dim} rotated channels "
                f"need {rotary_dim // 2}"
            )
        return torch.tensor(given, dtype=torch.float64)
    if method == "dynamic":
        if length is None:
            raise ConfigError(
                "rope scaling 'dynamic' has no frequencies to train with: transformers computes "
                "them anew for every sequence length; train with ntk, whose frequencies are those "
                "of one length"
            )
        factor = max(factor * length / original - (factor - 1), 1.0)
    if method in ("ntk", "dynamic"):
        per_pair = ntk_base(rotary_dim, base, factor) / base  # divided by b^0 .. b^((d-2)/d)
        return per_pair ** (torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    kept = _kept(before, rotary_dim, base, scaling)
    if method == "yarn_revised":
        return kept + (1 - kept) * factor
    return 1 / (kept + (1 - kept) / factor)


def _kept(before: Tensor, rotary_dim: int, base: float, scaling: RopeScaling) -> Tensor:
    """m_i or k_i: 1 where a pair keeps its frequency, 0 where the factor divides it."""
    original = scaling.original_max_position_embeddings
    turns = original * before / (2 * math.pi)
    if scaling.method == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        return ((turns - low) / (high - low)).clamp(0, 1)
    if scaling.over is not None:
        slow, fast = math.log(scaling.beta_slow), math.log(scaling.beta_fast)
        return ((turns.log() - slow) / (fast - slow)).clamp(0, 1)

    def pair_turning(times: float) -> float:  # solves L b^(-2i/d) = 2 pi times for i
        return rotary_dim * math.log(original / (2 * math.pi * times)) / (2 * math.log(base))

    first, last = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)  # d - 1, not d/2 - 1: YaRN's own clamp
    if first == last:
        last += 0.001
    pairs = torch.arange(rotary_dim // 2, dtype=torch.float64)
    return 1 - ((pairs - first) / (last - first)).clamp(0, 1)
