"""Laws of lengths: a histogram holds every row once, and its numbers are those of the rows."""

from collections import Counter
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from finetune.chat.lengths import Lengths


@given(st.lists(st.one_of(st.integers(1, 40), st.integers(1, 10**6)), max_size=60))
@example([1])
@example([16, 15])
@example([1, 16])
@example([999, 1000, 1001])
def test_a_histogram_holds_every_row_once(lengths: list[int]) -> None:
    """Steps cover all lengths without a gap, few enough to be read; the middle and the 95% are as sorting has them."""
    found = Lengths.of(Counter(lengths))
    if not lengths:
        assert found is None
        return
    assert found is not None
    ordered = sorted(lengths)
    assert (found.shortest, found.longest) == (ordered[0], ordered[-1])
    assert found.median == ordered[-(-len(ordered) // 2) - 1]
    assert found.most == ordered[-(-95 * len(ordered) // 100) - 1]
    assert all(last + 1 == first for (_, last, _), (first, *_) in pairwise(found.steps))
    assert found.steps[0][0] <= ordered[0] <= ordered[-1] <= found.steps[-1][1]
    assert [rows for *_, rows in found.steps] == [sum(a <= each <= b for each in lengths) for a, b, _ in found.steps]
    assert len(found.steps) <= 21
    assert found.steps[0][2]
    assert found.steps[-1][2]
