"""Rotary position embedding: inverse frequencies, attention factor, angles, Hugging Face's config.

One formula, one home: training takes its angles from here, and export writes the same numbers as
the `config.json` keys that transformers and vLLM read, so both see one embedding.

Notation: d = rotary_dim, b = base, s = scaling.factor, L = original_max_position_embeddings, T the
extended window. Pair i of d/2 turns by theta_i = b^(-2i/d) radians per position.

    none          theta_i
    linear        theta_i / s                       position interpolation (arXiv 2306.15595)
    ntk           theta_i with base b s^(d/(d-2))   fastest pair unchanged, slowest divided by s
    yarn          theta_i (m_i + (1 - m_i)/s)       YaRN (arXiv 2309.00071, NTK-by-parts)
    yarn_revised  theta_i / (m_i + (1 - m_i) s)     what PoSE's authors trained (arXiv 2309.10400)

where m_i goes from 1 (kept: the pair turns at least beta_fast times inside L) to 0 (interpolated:
at most beta_slow times), linearly in i. Both YaRNs multiply cos and sin by 0.1 ln s + 1.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

METHODS = ("none", "linear", "ntk", "yarn", "yarn_revised")
_YARN = ("yarn", "yarn_revised")


@dataclass(frozen=True)
class RopeScaling:
    """How the embedding is stretched from L to T positions; ValueError when inconsistent."""

    method: str = "none"  # one of METHODS
    factor: float = 1.0  # s >= 1, usually T / L
    original_max_position_embeddings: int | None = None  # L in tokens; the YaRNs need it
    beta_fast: float = 32.0  # turns inside L from which a pair is kept
    beta_slow: float = 1.0  # turns inside L up to which a pair is fully interpolated
    attention_factor: float | None = None  # YaRNs only; None: 0.1 ln s + 1
    truncate: bool = True  # YaRNs: round the ends of the ramp outwards to whole pairs

    def __post_init__(self):
        original = self.original_max_position_embeddings
        if self.method not in METHODS:
            raise ValueError(
                f"rope scaling method {self.method!r} is not one of {', '.join(METHODS)}"
            )
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise ValueError(f"rope scaling factor {self.factor} must be a finite number >= 1")
        if self.method == "none" and self.factor != 1:
            raise ValueError(
                f"rope scaling 'none' with factor {self.factor} contradicts itself: choose one of "
                f"{', '.join(METHODS[1:])}, or factor 1"
            )
        if original is not None and (isinstance(original, float) or original < 1):
            raise ValueError(
                f"original_max_position_embeddings {original} must be a whole number >= 1"
            )
        if self.method not in _YARN:
            if self.attention_factor is not None:
                raise ValueError(
                    f"rope scaling {self.method!r} has no attention_factor; remove "
                    f"{self.attention_factor} or choose one of {', '.join(_YARN)}"
                )
            return
        if original is None:
            raise ValueError(
                f"rope scaling {self.method!r} needs original_max_position_embeddings "
                "(--original-max-position-embeddings), the window the model was pretrained on"
            )
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(
                f"rope scaling needs beta_fast > beta_slow > 0, not {self.beta_fast} and "
                f"{self.beta_slow}"
            )
        if original <= 2 * math.pi * self.beta_slow:
            raise ValueError(
                f"original_max_position_embeddings {original} is too short for rope scaling "
                f"{self.method!r}: no pair turns beta_slow = {self.beta_slow} times inside it"
            )
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ValueError(f"rope scaling attention_factor {self.attention_factor} must be > 0")


def inverse_frequencies(rotary_dim: int, base: float, scaling: RopeScaling) -> Tensor:
    """Radians per position of each rotated pair: float64 [rotary_dim / 2], on the CPU.

    `rotary_dim` is the number of rotated channels of a head (kv_channels x rotary_percent). Raises
    ValueError for an odd `rotary_dim`, or a `base` that is not above 1.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"{rotary_dim} rotated channels per head: rope needs an even number >= 2")
    if not (math.isfinite(base) and base > 1):
        raise ValueError(f"rotary base {base} must be a finite number above 1")
    if scaling.method == "ntk":
        base = _ntk_base(rotary_dim, base, scaling)
    inv_freq = float(base) ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    if scaling.method in ("none", "ntk"):
        return inv_freq
    return inv_freq / _stretch(rotary_dim, base, scaling)


def attention_factor(scaling: RopeScaling) -> float:
    """Multiplies cos and sin, and so the attention logits by its square; 1.0 except for YaRNs."""
    if scaling.method not in _YARN:
        return 1.0
    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)
    return 0.1 * math.log(scaling.factor) + 1.0


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


def to_hf(
    scaling: RopeScaling, *, base: float, rotary_dim: int, max_position_embeddings: int
) -> dict:
    """The rope keys of a Hugging Face `config.json` that make transformers compute our frequencies.

    Every reader finds its spelling: `rope_theta` and `rope_scaling` (with `type` and `rope_type`)
    for transformers 4 and vLLM, `rope_parameters` for transformers 5. No Hugging Face type is
    called ntk: its base is written instead. `yarn_revised` becomes `longrope` with equal lists,
    which is exact.
    """
    factor, original = float(scaling.factor), scaling.original_max_position_embeddings
    keys = {}
    if scaling.method == "ntk":
        base = _ntk_base(rotary_dim, base, scaling)
    elif scaling.method == "linear":
        keys = {"factor": factor}
    elif scaling.method == "yarn":
        keys = {
            "factor": factor,
            "original_max_position_embeddings": original,
            **_ramp_keys(scaling),
        }
        if scaling.attention_factor is not None:
            keys["attention_factor"] = float(scaling.attention_factor)
    elif scaling.method == "yarn_revised":
        stretch = _stretch(rotary_dim, base, scaling).tolist()
        temperature = attention_factor(scaling)
        keys = {
            "factor": factor,
            "original_max_position_embeddings": original,
            "short_factor": stretch,
            "long_factor": stretch,
            "attention_factor": temperature,
            "short_mscale": temperature,  # vLLM reads these two and not attention_factor
            "long_mscale": temperature,
            **_ramp_keys(scaling),  # nobody else reads them here; from_hf does
        }
    base = float(base)
    hf_type = {"linear": "linear", "yarn": "yarn", "yarn_revised": "longrope"}.get(scaling.method)
    config = {"max_position_embeddings": max_position_embeddings, "rope_theta": base}
    if hf_type is None:
        config |= {
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": base},
        }
    else:
        named = {"rope_type": hf_type, "type": hf_type, **keys}
        config |= {"rope_scaling": named, "rope_parameters": {**named, "rope_theta": base}}
    if hf_type == "longrope":
        config["original_max_position_embeddings"] = original  # transformers 4 looks here
    return config


_RAMP = {"factor", "attention_factor", "beta_fast", "beta_slow", "truncate"}
_KEYS = {  # by Hugging Face type, beside rope_type, type, rope_theta and the original window
    "default": set(),
    "linear": {"factor"},
    "yarn": _RAMP | {"mscale", "mscale_all_dim"},
    "longrope": _RAMP | {"short_factor", "long_factor", "short_mscale", "long_mscale"},
}


def from_hf(config: dict) -> tuple[float, RopeScaling]:
    """(base, scaling) of a Hugging Face `config.json`, in any spelling of `default, linear, yarn`.

    Of `longrope` only our own export of `yarn_revised` is understood. Anything else, and spellings
    that contradict each other, raise a ValueError that names the key: plain rope is never assumed.
    """
    keys = {}
    for name in ("rope_scaling", "rope_parameters"):
        spelling = {k: v for k, v in (config.get(name) or {}).items() if v is not None}
        if nested := [key for key, value in spelling.items() if isinstance(value, dict)]:
            raise ValueError(f"config.json: {name} by layer type ({nested[0]}) is not supported")
        for key, value in spelling.items():  # `type` is the older name of rope_type
            _agree(keys, "rope_type" if key == "type" else key, value, name)
    for key in ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor"):
        if config.get(key) is not None:
            _agree(keys, key, config[key], "the top level")
    hf_type = keys.pop("rope_type", "default")
    base = float(keys.pop("rope_theta", 10000.0))  # LLaMA's own, which its first configs leave out
    if keys.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor other than 1 is not a LLaMA layout")
    if hf_type not in _KEYS:
        raise ValueError(
            f"config.json: rope_type {hf_type!r} is not supported; supported are {', '.join(_KEYS)}"
        )
    original = keys.pop("original_max_position_embeddings", None)
    if unknown := keys.keys() - _KEYS[hf_type]:
        raise ValueError(
            f"config.json: rope_type {hf_type!r} does not know {', '.join(sorted(unknown))}"
        )
    if hf_type == "default":
        return base, RopeScaling()
    lists = ("short_factor", "long_factor", "attention_factor") if hf_type == "longrope" else ()
    for key in ("factor", *lists):
        if key not in keys:
            raise ValueError(f"config.json: rope_type {hf_type!r} needs {key}, which is missing")
    if hf_type == "linear":
        return base, RopeScaling("linear", float(keys["factor"]), original)
    temperature = keys.get("attention_factor")
    if temperature is None and keys.get("mscale") and keys.get("mscale_all_dim"):
        step = 0.1 * math.log(keys["factor"])
        temperature = (step * keys["mscale"] + 1) / (step * keys["mscale_all_dim"] + 1)
    scaling = RopeScaling(
        "yarn" if hf_type == "yarn" else "yarn_revised",
        float(keys["factor"]),
        original,
        beta_fast=float(keys.get("beta_fast", 32.0)),
        beta_slow=float(keys.get("beta_slow", 1.0)),
        attention_factor=temperature,
        truncate=keys.get("truncate", True),
    )
    if hf_type == "longrope":
        _require_own_longrope(keys, base, scaling)
    plain = replace(scaling, attention_factor=None)
    return base, plain if attention_factor(plain) == attention_factor(scaling) else scaling


def _ntk_base(rotary_dim: int, base: float, scaling: RopeScaling) -> float:
    if rotary_dim < 4:
        raise ValueError(f"rope scaling 'ntk' needs at least 4 rotated channels, not {rotary_dim}")
    return base * scaling.factor ** (rotary_dim / (rotary_dim - 2))


def _stretch(rotary_dim: int, base: float, scaling: RopeScaling) -> Tensor:
    """By what each pair's frequency is divided: float64 [rotary_dim / 2] between 1 and s."""
    pairs = torch.arange(rotary_dim // 2, dtype=torch.float64)
    if scaling.method == "linear":
        return torch.full_like(pairs, scaling.factor)

    def pair_turning(times: float) -> float:  # solves L b^(-2i/d) = 2 pi times for i
        turns = scaling.original_max_position_embeddings / (2 * math.pi * times)
        return rotary_dim * math.log(turns) / (2 * math.log(base))

    first, last = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)  # d - 1, not d/2 - 1: YaRN's own clamp
    if first == last:
        last += 0.001
    kept = 1 - ((pairs - first) / (last - first)).clamp(0, 1)
    if scaling.method == "yarn":
        return 1 / (kept + (1 - kept) / scaling.factor)
    return kept + (1 - kept) * scaling.factor


def _ramp_keys(scaling: RopeScaling) -> dict:
    return {
        "beta_fast": float(scaling.beta_fast),
        "beta_slow": float(scaling.beta_slow),
        "truncate": scaling.truncate,
    }


def _agree(keys: dict, key: str, value, where: str) -> None:
    if keys.setdefault(key, value) != value:
        raise ValueError(
            f"config.json contradicts itself: {key} is {value!r} in {where} and {keys[key]!r} "
            "elsewhere; keep the one the model was trained with"
        )


def _require_own_longrope(keys: dict, base: float, scaling: RopeScaling) -> None:
    """Raise unless the lists of this longrope are those that to_hf writes for yarn_revised."""
    ours = _stretch(2 * len(keys["short_factor"]), base, scaling)
    for key in ("short_factor", "long_factor"):
        theirs = torch.tensor(keys[key], dtype=torch.float64)
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-6, atol=0):
            raise ValueError(
                f"config.json: the {key} of this longrope is not the ramp of yarn_revised; other "
                "longrope models are not supported"
            )
    for key in ("short_mscale", "long_mscale"):
        if keys.get(key, keys["attention_factor"]) != keys["attention_factor"]:
            raise ValueError(
                f"config.json contradicts itself: longrope {key} is {keys[key]} and "
                f"attention_factor {keys['attention_factor']}"
            )
