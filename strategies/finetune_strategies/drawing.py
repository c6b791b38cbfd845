"""Draws from strategies outside of a law: many values of a fixed run, or the simplest one that will do."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import find, given
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

from finetune_strategies.profiles import examples


def drawn(strategy: st.SearchStrategy[Any], *, share: float = 5) -> list[Any]:
    """So many times a law's values (120 of them), the same ones in every profile and at every run.

    Hypothesis draws words and numbers that it finds in our own code, too; not here, for every change of that code, and
    whatever else was imported before, would move what is counted.
    """
    found: list[Any] = []

    @given(strategy)
    @examples(share, of="fast")
    def draw(value: Any) -> None:
        found.append(value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(providers, "_get_local_constants", Constants)
        providers.CONSTANTS_CACHE.cache.clear()
        draw()
    providers.CONSTANTS_CACHE.cache.clear()
    return found


def simplest(strategy: st.SearchStrategy[Any], wanted: Callable[[Any], bool] = lambda value: True) -> Any:
    """What a failure that needs a `wanted` value is reported with."""
    return find(strategy, wanted, settings=examples(50, of="fast"))
