"""Laws of the intervals: they are those of the literature and of the equation that defines them."""

import itertools
import math
from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.intervals import difference_interval, most_probable, wilson_interval
from finetune_strategies.profiles import examples

PUBLISHED_SHARES = [
    # R. G. Newcombe, Statistics in Medicine 17, 1998, 857-872, table I, method 3 (Wilson score).
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
]
PUBLISHED_DIFFERENCES = [
    # R. G. Newcombe, Statistics in Medicine 17, 1998, 873-890, table II, method 10.
    (56, 70, 48, 80, 0.0524, 0.3339),
    (9, 10, 3, 10, 0.1705, 0.8090),
    (6, 7, 2, 7, 0.0582, 0.8062),
    (5, 56, 0, 29, -0.0381, 0.1926),
    (0, 10, 0, 20, -0.1611, 0.2775),
    (0, 10, 0, 10, -0.2775, 0.2775),
    (10, 10, 0, 20, 0.6791, 1.0000),
    (10, 10, 0, 10, 0.6075, 1.0000),
]


@pytest.mark.parametrize(("right", "count", "low", "high"), PUBLISHED_SHARES)
def test_wilson_is_the_published_interval(right: int, count: int, low: float, high: float) -> None:
    """The interval of a share is the published one, to its four digits."""
    assert wilson_interval(right, count) == pytest.approx((low, high), abs=5.1e-5)


@pytest.mark.parametrize(("a", "m", "b", "n", "low", "high"), PUBLISHED_DIFFERENCES)
def test_difference_is_the_published_interval(a: int, m: int, b: int, n: int, low: float, high: float) -> None:
    """The interval of a difference is the published one, to its four digits."""
    assert difference_interval((a, m), (b, n)) == pytest.approx((low, high), abs=5.1e-5)


def _solved(share: float, count: int, start: float, end: float) -> float:
    """Where |share - p| is 1.96 standard errors of p, by halving."""
    for _ in range(200):
        middle = (start + end) / 2
        inside = (share - middle) ** 2 <= 1.959963984540054**2 * middle * (1 - middle) / count
        start, end = (middle, end) if inside else (start, middle)
    return (start + end) / 2


@given(st.integers(1, 500).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilson_solves_the_score_equation(case: tuple[int, int]) -> None:
    """Both ends are where the share lies 1.96 standard errors of the end away, found by halving."""
    right, count = case
    low, high = wilson_interval(right, count)
    assert 0 <= low <= right / count + 1e-15
    assert right / count - 1e-15 <= high <= 1
    inner = right / count if 0 < right < count else abs(right / count - 1e-9)
    assert low == pytest.approx(_solved(right / count, count, inner, 0.0), abs=1e-9)
    assert high == pytest.approx(_solved(right / count, count, inner, 1.0), abs=1e-9)


def test_wilson_covers_what_it_promises() -> None:
    """Of 20 answers, whatever the true share, the interval holds it about 95% of the time and never below 83%."""
    covered = []
    for tenth in range(1, 200):
        truth = tenth / 200
        hits = [low <= truth <= high for low, high in (wilson_interval(right, 20) for right in range(21))]
        covered.append(
            sum(
                math.comb(20, right) * truth**right * (1 - truth) ** (20 - right) * hit
                for right, hit in enumerate(hits)
            )
        )
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.01)
    assert min(covered) > 0.83


def test_difference_grows_with_every_right_answer() -> None:
    """One more right answer of the first moves both ends up; exchanging the two turns the interval round."""
    for count, other in itertools.product((1, 7, 20), range(6)):
        intervals = [difference_interval((right, count), (other, 5)) for right in range(count + 1)]
        assert all(new[0] > old[0] and new[1] > old[1] for old, new in itertools.pairwise(intervals))
        for right, (low, high) in enumerate(intervals):
            assert difference_interval((other, 5), (right, count)) == pytest.approx((-high, -low))
            assert low <= right / count - other / 5 <= high


@pytest.mark.parametrize(("right", "count"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_share(right: int, count: int) -> None:
    """No questions, or more right answers than questions, have no interval."""
    with pytest.raises(ValueError, match="no interval"):
        wilson_interval(right, count)


@pytest.mark.parametrize(
    ("seen", "count", "bound"),
    [
        (0, 20, 1 - 0.05 ** (1 / 20)),
        (0, 200, 1 - 0.05 ** (1 / 200)),
        (0, 5_000, 1 - 0.05 ** (1 / 5_000)),
        (9, 10, 0.95 ** (1 / 10)),
        (4_999, 5_000, 0.95 ** (1 / 5_000)),
        (1, 10, 0.39416),
        (7, 7, 1.0),
    ],
)
def test_most_probable_is_the_published_bound(seen: int, count: int, bound: float) -> None:
    """Where nothing, all but one, or everything was seen there is a closed form; 1 of 10 is from published tables."""
    assert most_probable(seen, count) == pytest.approx(bound, abs=5e-6)


@given(case=st.integers(1, 60).flatmap(lambda count: st.tuples(st.integers(0, count - 1), st.just(count))))
@examples(share=2)
def test_most_probable_solves_its_equation(case: tuple[int, int]) -> None:
    """At the bound so few are seen with a probability of exactly 5%, computed in whole numbers."""
    seen, count = case
    chance = Fraction(most_probable(seen, count))
    tail = sum(comb(count, each) * chance**each * (1 - chance) ** (count - each) for each in range(seen + 1))
    assert float(tail) == pytest.approx(0.05, abs=1e-9)


@pytest.mark.parametrize(("seen", "count"), [(-1, 3), (4, 3), (0, 0)])
def test_most_probable_refuses_what_is_no_count(seen: int, count: int) -> None:
    """More than all, less than none, and nothing at all are mistakes."""
    with pytest.raises(ValueError, match="no bound for"):
        most_probable(seen, count)
