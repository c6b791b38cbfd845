"""Draws from strategies outside of a law: many values of a fixed run, or the simplest one that will do."""

from collections.abc import Callable
from typing import Any

from hypothesis import find, given
from hypothesis import strategies as st

from finetune_strategies.profiles import examples


def drawn(strategy: st.SearchStrategy[Any], *, share: float = 5) -> list[Any]:
    """So many times a law's values (120 of them), the same ones in every profile and at every run."""
    found: list[Any] = []

    @given(strategy)
    @examples(share, of="fast")
    def draw(value: Any) -> None:
        found.append(value)

    draw()
    return found


def simplest(strategy: st.SearchStrategy[Any], wanted: Callable[[Any], bool] = lambda value: True) -> Any:
    """What a failure that needs a `wanted` value is reported with."""
    return find(strategy, wanted, settings=examples(50, of="fast"))
