"""How many tokens rows have, as a few numbers and a histogram."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

_BARS = 10
_UNEVEN = 16
"""From how many times the shortest row's tokens in the longest on the steps of a histogram double."""
_NICE = (1, 2, 5)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the shortest, the middle and the longest row, and how many 95% of them do not exceed.

    `steps`: of each bar of the histogram its fewest and its most tokens, and how many rows have so many.
    """

    shortest: int
    median: int
    most: int
    longest: int
    steps: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, rows: Mapping[int, int]) -> "Lengths | None":
        """Of so many rows of each length; None of none."""
        if not rows:
            return None
        lengths = sorted(rows)
        sums = list(accumulate(rows[length] for length in lengths))

        def reached(share: float) -> int:
            return next(length for length, so_far in zip(lengths, sums, strict=True) if so_far >= share * sums[-1])

        edges = list(_edges(lengths[0], lengths[-1]))
        steps = tuple(
            (first, after - 1, sum(count for length, count in rows.items() if first <= length < after))
            for first, after in pairwise(edges)
        )
        return cls(lengths[0], reached(0.5), reached(0.95), lengths[-1], steps)


def _edges(shortest: int, longest: int) -> Iterator[int]:
    """Where bars begin, and after the last one where it ends: round numbers as far apart, or each twice the last."""
    doubles = longest >= _UNEVEN * max(1, shortest)
    step, tries = 1, (nice * 10**power for power in range(20) for nice in _NICE)
    while not doubles and (longest - shortest) // step >= _BARS:
        step = next(tries)
    edge = 1 << max(0, shortest.bit_length() - 1) if doubles else shortest // step * step
    yield edge
    while edge <= longest:
        edge = 2 * edge if doubles else edge + step
        yield edge
