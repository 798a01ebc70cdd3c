"""Shares of answers that were found: how sure they are, and up to which length they are enough."""

import math
from collections.abc import Mapping, Sequence


def effective_length(found: Mapping[int, float], threshold: float) -> int:
    """The longest context length up to which all have found at least the threshold; 0: none has."""
    effective = 0
    for length in sorted(found):
        if found[length] < threshold:
            break
        effective = length
    return effective


def interval(answers: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """95 % confidence interval for the share of answers that were found.

    Wilson's; where haystacks gave several answers each, which are alike, for so many independent
    answers as have the same spread between haystacks (Kish's design effect).

    Args:
        answers: by haystack, at least one of each.
    """
    n = float(sum(map(len, answers)))
    share = sum(map(sum, answers)) / n
    if n > len(answers) > 1 and 0 < share < 1:
        apart = (len(some) * (sum(some) / len(some) - share) ** 2 for some in answers)
        between = sum(apart) / (len(answers) - 1)
        n /= max(between / (share * (1 - share)), 1.0)
    return wilson(share, n)


def wilson(share: float, trials: float) -> tuple[float, float]:
    """Wilson's 95 % confidence interval for a share of independent trials."""
    z = 1.959963984540054
    spread = z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)
