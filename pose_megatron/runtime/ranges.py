"""Which numbers a flag takes: every numeric flag of every program has a `Range` beside it.

    whole(1)                   1, 2, 3, ...
    real(at_least=0, below=1)  [0, 1)

Numbers are written as JSON and YAML 1.2 write them, in digits alone: int() and float() would also
read 1_000, digits of other scripts and blanks.
"""

import argparse
import math
import re
from dataclasses import dataclass

WRITTEN = {
    int: re.compile(r"[-+]?[0-9]+"),
    float: re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
}
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)
_WORDS = {int: "a whole number", float: "a number"}
# What is counted is also divided in float64, and what is computed is computed in float32.
LARGEST_COUNT = 2**53
LARGEST_REAL = float.fromhex("0x1.fffffep+127")
LARGEST_INT32 = 2**31 - 1  # token and position ids are int32 on disk
LARGEST_SEED = 2**32 - 1  # numpy's
_CEILINGS = LARGEST_COUNT, LARGEST_REAL, LARGEST_INT32


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`, the ends included or not; finite ones only.

    As argparse's `type` it reads a flag's text and refuses what lies outside.

    Attributes:
        kind: int or float.
        also: one number outside of the range that counts too, such as 0 for "never".
    """

    kind: type[int] | type[float]
    least: float
    most: float
    least_included: bool = True
    most_included: bool = True
    also: float | None = None

    def __contains__(self, value: float) -> bool:
        """NaN lies in no range."""
        above = value > self.least or (self.least_included and value == self.least)
        below = value < self.most or (self.most_included and value == self.most)
        return (above and below) or (self.also is not None and value == self.also)

    def read(self, text: str) -> int | float:
        """The number that a text writes, in the range or not.

        Raises:
            argparse.ArgumentTypeError: it writes none of this kind.
        """
        if WRITTEN[self.kind].fullmatch(text) and len(text) < 400:
            return self.kind(text)
        if _NOT_FINITE.fullmatch(text):
            return float(text.replace(".", ""))
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is not {_WORDS[self.kind]}")

    def fault(self, value: float) -> str | None:
        """What is wrong with a value, as in "--lr must be ..."; None if nothing is."""
        if value in self:
            return None
        wanted = str(self)
        if not math.isfinite(value):
            wanted = f"finite and {self}"
        elif value > self.most and not self._bounded:
            wanted = f"at most {self._shown(self.most)}"
        return f"must be {wanted}, not {value}"

    def __call__(self, text: str) -> int | float:
        value = self.read(text)
        if fault := self.fault(value):
            raise argparse.ArgumentTypeError(fault)
        return value

    def __str__(self) -> str:
        """at least 1, above 0, in [0, 1)."""
        also = "" if self.also is None else f"{self.also:g} or "
        least, most = self._shown(self.least), self._shown(self.most)
        if not self._bounded:
            word = "at least" if self.least_included else "above"
            return f"{also}{word} {least}"
        left, right = "(["[self.least_included], ")]"[self.most_included]
        return f"{also}in {left}{least}, {most}{right}"

    @property
    def _bounded(self) -> bool:
        """Whether the upper end is the flag's own."""
        return self.most not in _CEILINGS

    def _shown(self, end: float) -> str:
        return str(end) if self.kind is int else f"{end:g}"


def whole(at_least: int, at_most: int = LARGEST_COUNT) -> Range:
    """Whole numbers."""
    return Range(int, at_least, at_most)


def real(
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    also: float | None = None,
) -> Range:
    """Numbers with a lower end, `at_least` or `above`, and perhaps an upper one."""
    least = above if at_least is None else at_least
    assert least is not None, "a range begins somewhere"
    most = below if at_most is None else at_most
    return Range(
        float,
        least,
        LARGEST_REAL if most is None else most,
        at_least is not None,
        below is None,
        also,
    )
