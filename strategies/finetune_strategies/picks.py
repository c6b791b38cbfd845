"""Small strategies that are made once: making one anew for every value costs more than drawing the value from it."""

from functools import lru_cache
from typing import Any, TypeVar

from hypothesis import strategies as st

Value = TypeVar("Value")


def pick(*values: Value) -> st.SearchStrategy[Value]:
    """One of these values, the first one being the simplest: `st.sampled_from`, for use within other strategies."""
    found: st.SearchStrategy[Value] = _sampled(*values)
    return found


@lru_cache(maxsize=1_000, typed=True)
def between(least: int, most: int) -> st.SearchStrategy[int]:
    """A whole number from `least` to `most`: `st.integers`, for use within other strategies."""
    return st.integers(least, most)


@lru_cache(maxsize=1_000, typed=True)
def order_of(*values: Value) -> st.SearchStrategy[list[Value]]:
    """These values in any order: `st.permutations`, for use within other strategies."""
    return st.permutations(values)


EITHER = st.booleans()


# Equal values of other types, such as 0 and False, are other choices.
@lru_cache(maxsize=1_000, typed=True)
def _sampled(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)
