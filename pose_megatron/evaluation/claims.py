"""Claims about models, and whether results bear them out.

A claim says that something is at most a limit: how much more one model loses than another, or how
many more answers one finds. It holds where the whole 95 % confidence interval lies at or below the
limit, it does not hold where the whole interval lies above, and is undecided otherwise.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pose_megatron.errors import ConfigError
from pose_megatron.runtime.atomic_files import write_atomically

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval.

    Attributes:
        n: how many values it is from.
    """

    mean: float
    low: float
    high: float
    n: int

    def in_nats(self, of: str) -> str:
        """For a person; `of` says what the values are from."""
        return f"{self.mean:+.3f} nats ({self.low:+.3f} to {self.high:+.3f}, {self.n} {of})"

    def __neg__(self) -> "Interval":
        return Interval(-self.mean, -self.high, -self.low, self.n)


@dataclass(frozen=True)
class Verdict:
    """What results say of a claim.

    Attributes:
        verdict: HOLDS, FAILS or UNDECIDED.
        numbers: what it is decided by, for a person.
    """

    claim: str
    verdict: str
    numbers: str


def mean_of(values: Sequence[float]) -> Interval:
    """The mean of independent values, with Student's interval; infinite for a single one."""
    n = len(values)
    mean = statistics.fmean(values)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = student(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def difference_of_shares(one: Interval, other: Interval) -> Interval:
    """one - other, of shares with Wilson's intervals, from independent samples.

    Newcombe, "Interval estimation for the difference between independent proportions", method 10
    (1998). Where both were asked the same, it is wider than need be.
    """
    mean = one.mean - other.mean
    low = mean - math.hypot(one.mean - one.low, other.high - other.mean)
    high = mean + math.hypot(one.high - one.mean, other.mean - other.low)
    return Interval(mean, low, high, min(one.n, other.n))


def at_most(claim: str, value: Interval, limit: float, numbers: str) -> Verdict:
    """The verdict on `value <= limit`."""
    verdict = UNDECIDED
    if value.high <= limit:
        verdict = HOLDS
    elif value.low > limit:
        verdict = FAILS
    return Verdict(claim, verdict, numbers)


def write_verdicts(path: Path, verdicts: Sequence[Verdict]) -> None:
    """As a JSON list of objects, for a report."""
    found = [dataclasses.asdict(verdict) for verdict in verdicts]
    write_atomically(path, json.dumps(found, indent=1) + "\n")


def read_verdicts(path: str) -> list[Verdict]:
    """
    Args:
        path: --verdicts.

    Raises:
        ConfigError: the file is missing, or holds no verdicts.
    """
    try:
        rows = json.loads(Path(path).read_bytes())
        if not isinstance(rows, list):
            raise TypeError(f"it holds {type(rows).__name__}")
        verdicts = [Verdict(**row) for row in rows]
        if all(v.verdict in (HOLDS, FAILS, UNDECIDED) for v in verdicts):
            return verdicts
        reason = f"a verdict is one of {HOLDS}, {FAILS} and {UNDECIDED}"
    except FileNotFoundError:
        reason = "no such file"
    except (ValueError, TypeError, RecursionError) as error:
        reason = str(error)
    raise ConfigError(
        f"--verdicts {path}: not a list of claim, verdict and numbers ({reason})"
    ) from None


@lru_cache
def student(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution."""
    low, high = 0.0, 13.0  # 12.706 for one degree of freedom, and less for more
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, degrees) < 0.95 else (low, middle)
    return (low + high) / 2


def _inside(t: float, degrees: int) -> float:
    """P(|T| < t), Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(2 + odd, degrees, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
