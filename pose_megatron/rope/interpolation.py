"""What an interpolation method says about itself; `methods` has one class for each.

Notation: d = rotary_dim, b = rotary base, s = factor, L = original_max_position_embeddings,
T the extended window. Pair i of d/2 turns by theta_i = b^(-2i/d) radians per position, and so
L theta_i / (2 pi) times inside L.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from pose_megatron.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Pairs:
    """The rotated pairs of channels in a head, as they turn before an interpolation.

    Attributes:
        base: b.
        frequencies: theta, radians per position: float64 [rotary_dim / 2], on the CPU.
        plain: theta_i = b^(-2i/d); False when another scaling has changed them already.
    """

    base: float
    frequencies: Tensor
    plain: bool = True

    @classmethod
    def unscaled(cls, rotary_dim: int, base: float) -> "Pairs":
        """The pairs of plain rope.

        Raises:
            ConfigError: `rotary_dim` is odd, or `base` not above 1.
        """
        if rotary_dim < 2 or rotary_dim % 2:
            raise ConfigError(
                f"{rotary_dim} rotated channels per head: rope needs an even number >= 2"
            )
        if not (math.isfinite(base) and base > 1):
            raise ConfigError(f"rotary base {base} must be a finite number above 1")
        channels = torch.arange(0, rotary_dim, 2, dtype=torch.float64)
        return cls(base, float(base) ** (-channels / rotary_dim))

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.frequencies)

    def turns(self, window: int) -> Tensor:
        """How often each pair turns inside `window` positions: float64 [rotary_dim / 2]."""
        return window * self.frequencies / (2 * math.pi)


@dataclass(frozen=True)
class Interpolation(ABC):
    """One method with its options, which are the fields below and those that a subclass adds.

    A subclass gives at least `name` and `stretch`. Its fields become fields of RopeScaling and keys
    of --rope-scaling-config; its checks stand in its `__post_init__`. Unless it says otherwise, it
    is exported as Hugging Face's longrope, whose lists can hold any fixed frequencies.
    """

    factor: float = 1.0  # s >= 1, usually T / L
    original_max_position_embeddings: int | None = None  # L in tokens

    name: ClassVar[str]  # for --rope-scaling
    needs_window: ClassVar[bool] = True  # the formula has L in it
    reaches_factor_times_window: ClassVar[bool] = False  # a target T beyond s L is refused
    extends_scaled: ClassVar[bool] = True  # may stretch a model that is scaled already
    trains: ClassVar[bool] = True  # `stretch` works without a length
    keeps_window: ClassVar[bool] = False  # max_position_embeddings stays L while s reaches beyond

    hf_type: ClassVar[str] = "longrope"  # `rope_type` in config.json
    # Keys of config.json beside rope_type, rope_theta and L: those that must be there (None: this
    # method is never read back by its own name), and those that may.
    hf_required: ClassVar[frozenset[str] | None] = None
    hf_optional: ClassVar[frozenset[str]] = frozenset()
    longrope_is_safer: ClassVar[bool] = False  # some readers misread hf_type: --rope-as-longrope

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if field.type in (float, float | None) and not is_number(value):
                raise ConfigError(f"rope scaling {field.name} {value!r} must be a finite number")
            if field.type is bool and not isinstance(value, bool):
                raise ConfigError(f"rope scaling {field.name} {value!r} must be true or false")
        if self.factor < 1:
            raise ConfigError(f"rope scaling factor {self.factor} must be at least 1")
        original = self.original_max_position_embeddings
        if original is not None and (not isinstance(original, int) or original < 1):
            raise ConfigError(
                f"original_max_position_embeddings {original} must be a whole number >= 1"
            )
        if original is None and self.needs_window:
            raise ConfigError(
                f"rope scaling {self.name!r} needs original_max_position_embeddings "
                "(--original-max-position-embeddings), the window the model was pretrained on"
            )

    @property
    def window(self) -> int:
        """L, where `needs_window`."""
        assert self.original_max_position_embeddings is not None
        return self.original_max_position_embeddings

    @property
    def depends_on_length(self) -> bool:
        """Whether short sequences have other frequencies than long ones."""
        return False

    @abstractmethod
    def stretch(self, pairs: Pairs, length: int | None = None) -> Tensor | float:
        """What each pair's frequency is divided by: float64 [rotary_dim / 2], or one number.

        Args:
            length: tokens of the sequence, for a method that `depends_on_length`; None for what
                training uses.

        Raises:
            ConfigError: the method does not fit so many pairs, or needs a length.
        """

    def temperature(self) -> float:
        """Multiplies cos and sin: Hugging Face's attention_factor, an option of some methods."""
        return 1.0

    def to_hf(self, pairs: Pairs, window: int) -> dict[str, Any]:
        """Keys of config.json's rope beside `rope_type`; a `rope_theta` among them replaces b.

        Args:
            window: T, the model's max_position_embeddings.
        """
        if self.hf_type != "longrope":
            return {"factor": float(self.factor)}
        divided = pairs.frequencies / self.stretch(pairs)
        return longrope_keys(
            self.factor,
            self.original_max_position_embeddings or max(1, round(window / self.factor)),
            (pairs.frequencies / divided).tolist(),
            self.temperature(),
        )

    @classmethod
    def from_hf(cls, keys: dict[str, Any], window: int | None, base: float) -> dict[str, Any]:
        """Fields of RopeScaling from the keys of `hf_required`, `hf_optional` and L.

        Args:
            window: max_position_embeddings in the same config.json.

        Raises:
            ConfigError: the keys contradict each other.
        """
        return keys

    def notes(self, window: int) -> list[str]:
        """What users of other programs must know about the export, a sentence each."""
        return longrope_notes(window) if self.hf_type == "longrope" else []

    def float32_error(self, pairs: Pairs) -> Tensor:
        """The most that this method's arithmetic in float32, in transformers, adds to each
        frequency's relative error: float64 [rotary_dim / 2]."""
        return torch.zeros_like(pairs.frequencies)

    def to_megatron(self, pairs: Pairs) -> dict[str, Any]:
        """Megatron-LM arguments that give these frequencies; empty where it has none."""
        return {}


def longrope_keys(
    factor: float,
    original: int,
    long: list[float],
    attention_factor: float,
    short: list[float] | None = None,
) -> dict[str, Any]:
    """Hugging Face's longrope: theta is divided by `long` beyond the original window, and by
    `short` (default: the same) up to it."""
    return {
        "factor": float(factor),
        "original_max_position_embeddings": original,
        "short_factor": long if short is None else short,
        "long_factor": long,
        "attention_factor": attention_factor,
        "short_mscale": attention_factor,  # vLLM reads these two and not attention_factor
        "long_mscale": attention_factor,
    }


def longrope_notes(window: int) -> list[str]:
    return [
        "vLLM starts a longrope with the window before it was extended; start it with "
        f"--max-model-len {window}",
        "llama.cpp does not read the lists of longrope for this family and would compute plain "
        "rope; do not convert it to GGUF",
    ]


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_attention_factor(value: float | None) -> None:
    if value is not None and not value > 0:
        raise ConfigError(f"rope scaling attention_factor {value} must be > 0")


def ramp_error(ramp: Tensor, error: float, factor: float) -> Tensor:
    """How far an error of the ramp m_i moves m_i + (1 - m_i)/s, relative to itself.

    Only pairs on the ramp have it: elsewhere m_i is 0 or 1, whatever the error.

    Args:
        ramp: m_i before it is held within [0, 1].
        factor: s.
    """
    kept = ramp.clamp(0, 1)
    there = (ramp > -error) & (ramp < 1 + error)
    return there * error * (1 - 1 / factor) / (kept + (1 - kept) / factor)
