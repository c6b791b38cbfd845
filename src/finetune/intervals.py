"""Intervals for shares, so that no verdict on a handful of answers pretends to be exact."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

Z95 = 1.959963984540054
"""The two-sided 95% point of the normal distribution."""
_FEWEST_MEANT = 4


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a share.

    Source: E. B. Wilson, 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= right <= count or count == 0:
        raise ValueError(f"no interval for {right} of {count}")
    share = right / count
    scale = 1 + Z95**2 / count
    centre = (share + Z95**2 / (2 * count)) / scale
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def difference_interval(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float]:
    """The 95% interval of the difference of two shares, each given as (right, count).

    Source: R. G. Newcombe, 1998, "Interval estimation for the difference between independent proportions", method 10.
    """
    p, q = first[0] / first[1], second[0] / second[1]
    (low_p, high_p), (low_q, high_q) = wilson_interval(*first), wilson_interval(*second)
    below = math.hypot(p - low_p, high_q - q)
    above = math.hypot(high_p - p, q - low_q)
    return p - q - below, p - q + above


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of a mean by Student's t; None for fewer than four values, where it says next to nothing.

    Source: the quantile of t by its expansion around the normal one, Abramowitz and Stegun 26.7.5.
    """
    if len(values) < _FEWEST_MEANT:
        return None
    free, z = len(values) - 1, Z95
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    middle, half = fmean(values), t * stdev(values) / math.sqrt(len(values))
    return middle - half, middle + half


def _probability(seen: int, count: int, chance: float) -> float:
    """How probable it is to see something so often; by logarithms, as the ways in which it can come are many."""
    ways = math.lgamma(count + 1) - math.lgamma(seen + 1) - math.lgamma(count - seen + 1)
    return math.exp(ways + seen * math.log(chance) + (count - seen) * math.log1p(-chance))


def most_probable(seen: int, count: int, confidence: float = 0.95) -> float:
    """How probable something can be, at most, that was seen so often: the one-sided Clopper-Pearson bound.

    Source: C. J. Clopper and E. S. Pearson, 1934, "The use of confidence or fiducial limits".
    """
    if not 0 <= seen <= count or count == 0:
        raise ValueError(f"no bound for {seen} of {count}")
    if seen == count:
        return 1.0
    low, high = seen / count, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        tail = math.fsum(_probability(each, count, middle) for each in range(seen + 1))
        low, high = (middle, high) if tail > 1 - confidence else (low, middle)
    return high


def chance_of_at_least(seen: int, count: int, chance: float = 0.5) -> float:
    """How probable it is to see at least so many of `count`, each with this chance: the exact one-sided sign test."""
    return math.fsum(
        math.comb(count, each) * chance**each * (1 - chance) ** (count - each) for each in range(seen, count + 1)
    )
