"""Checkpoints to save one after the other, and files to replace."""

from typing import Annotated

from hypothesis import strategies as st
from pydantic import Field

from finetune_strategies.recipes import Recipe


class Orders(Recipe):
    """Steps whose checkpoints are saved one after the other, and which of them is the best from then on."""

    steps: Annotated[tuple[int, ...], Field(min_length=3, max_length=5, strict=False)]
    best: Annotated[int, Field(ge=0, le=1)]
    keep: Annotated[int, Field(ge=1, le=2)]


ORDERS = st.builds(
    Orders,
    steps=st.sampled_from([(8, 9, 10, 11), (1, 2, 3), (98, 99, 100), (9_999, 10_000, 10_001, 10_002)]),
    best=st.integers(0, 1),
    keep=st.integers(1, 2),
)


class Replaced(Recipe):
    """A text, another that takes its place, and how many letters of that the disk takes."""

    before: str
    after: str
    room: Annotated[int, Field(ge=0, le=9)]


FILES_WHOLE = st.builds(
    Replaced, before=st.just("before"), after=st.sampled_from(["after", "x"]), room=st.sampled_from([0, 2, 9])
)


class Wanted(Recipe):
    """How many bytes a model takes."""

    size: Annotated[int, Field(ge=1)]


FILES_ROOM = st.builds(Wanted, size=st.sampled_from([1, 10**17]))
