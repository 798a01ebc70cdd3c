"""RopeScaling, and the inverse frequencies and attention factor that it gives.

One formula, one home: training takes its angles from here, and export (`huggingface`) writes the
same numbers as keys that transformers and vLLM read. The formulas stand in `methods`.

A scaling may lie `over` another, which the model had before this extension: the method then
stretches the frequencies that the other gives, and attention factors multiply.
"""

from dataclasses import dataclass, fields, make_dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from pose_megatron.errors import ConfigError
from pose_megatron.rope.interpolation import Interpolation, Pairs
from pose_megatron.rope.methods import METHODS

# Every option of every method once: (name, type, default).
_OPTIONS = {
    field.name: (field.name, field.type, field.default)
    for method in METHODS.values()
    for field in fields(method)
}
_Fields: Any = make_dataclass("_Fields", [("method", str, "none"), *_OPTIONS.values()], frozen=True)


@dataclass(frozen=True)
class RopeScaling(_Fields):
    """How rope is stretched from L to T positions: a method by name, with its options.

    Fields are method, factor (s), original_max_position_embeddings (L), the options of all methods
    (beta_fast, attention_factor, long_factor, ...: see the classes in `methods`), and `over`.

    Raises:
        ConfigError: the method is unknown, an option is not one of its own, or a value makes no
            sense.
    """

    method: str = "none"  # one of METHODS
    factor: float = 1.0  # s >= 1, usually T / L
    original_max_position_embeddings: int | None = None  # L in tokens; linear and ntk do without
    over: "RopeScaling | None" = None  # the scaling that this one extends

    def __post_init__(self):
        if self.method not in tuple(METHODS):  # a tuple: the name may be a list, from a JSON file
            raise ConfigError(
                f"rope scaling method {self.method!r} is not one of {', '.join(METHODS)}"
            )
        if isinstance(self.over, dict):
            object.__setattr__(self, "over", RopeScaling(**self.over))
        for field in fields(self.interpolation):  # as the method completed them: lists as tuples
            object.__setattr__(self, field.name, getattr(self.interpolation, field.name))
        for field in fields(self):
            value = getattr(self, field.name)
            known = [name for name, method in METHODS.items() if _has(method, field.name)]
            if known and self.method not in known and value != field.default:
                raise ConfigError(
                    f"rope scaling {self.method!r} has no {field.name}; remove {value} or choose "
                    f"{' or '.join(known)}"
                )
        if self.over is not None:
            self._check_over(self.over)

    @cached_property
    def interpolation(self) -> Interpolation:
        """The method with its own options."""
        method = METHODS[self.method]
        return method(**{field.name: getattr(self, field.name) for field in fields(method)})

    @property
    def depends_on_length(self) -> bool:
        """Whether short sequences have other frequencies than long ones."""
        return self.interpolation.depends_on_length

    def __str__(self) -> str:
        window = self.original_max_position_embeddings if self.factor > 1 else None
        text = f"{self.method} x{self.factor:g}" + (f" from {window}" if window else "")
        return text if self.over is None else f"{text} over {self.over}"

    def _check_over(self, over: "RopeScaling"):
        if not self.interpolation.extends_scaled:
            *others, last = (name for name, method in METHODS.items() if method.extends_scaled)
            raise ConfigError(
                f"rope scaling {self.method!r} cannot extend a model that is already scaled with "
                f"{over.method!r}: choose {', '.join(others)} or {last}"
            )
        if over.depends_on_length:
            raise ConfigError(
                f"rope scaling {over.method!r} cannot be extended: its frequencies change "
                "with the sequence's length"
            )


def inverse_frequencies(
    rotary_dim: int, base: float, scaling: RopeScaling, length: int | None = None
) -> Tensor:
    """Radians per position of each rotated pair: float64 [rotary_dim / 2], on the CPU.

    Args:
        rotary_dim: rotated channels of a head (kv_channels x rotary_percent).
        length: tokens of the sequence (its largest position + 1), on which dynamic and a longrope
            of two lists depend; None for what training uses, the long list.

    Raises:
        ConfigError: `rotary_dim` is odd, `base` not above 1, a list of another length than
            rotary_dim / 2, or `dynamic` without a length.
    """
    pairs = Pairs.unscaled(rotary_dim, base)
    if scaling.over is not None:
        pairs = Pairs(base, inverse_frequencies(rotary_dim, base, scaling.over), plain=False)
    return pairs.frequencies / scaling.interpolation.stretch(pairs, length)


def attention_factor(scaling: RopeScaling) -> float:
    """Multiplies cos and sin, and so the attention logits by its square; 1.0 for most methods."""
    before = 1.0 if scaling.over is None else attention_factor(scaling.over)
    return before * scaling.interpolation.temperature()


def _has(method: type[Interpolation], option: str) -> bool:
    return option in {field.name for field in fields(method)}
