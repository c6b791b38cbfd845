"""Rows and how they are dealt out, padded or packed."""

from collections.abc import Sequence
from typing import Annotated

from hypothesis import strategies as st
from pydantic import Field

from finetune_strategies.cases.rows import PLAIN, IdRow, Rows, rows_of, token_rows
from finetune_strategies.recipes import Recipe


class Dealt(Rows):
    """Rows, and how they are dealt out."""

    batch_size: Annotated[int, Field(ge=1, le=8)]
    accumulation: Annotated[int, Field(ge=1, le=4)]
    seed: Annotated[int, Field(ge=0)]


@st.composite
def _dealt_rows(draw: st.DrawFn) -> Dealt:
    """Whole batches and what is left over, so that a smaller batch size makes fewer rows."""
    size = draw(st.integers(1, 4))
    count = max(1, size * draw(st.integers(0, 2)) + draw(st.integers(0, size - 1)))
    rows = draw(rows_of(count, count))
    return Dealt(rows=rows, batch_size=size, accumulation=draw(st.integers(1, 3)), seed=draw(st.integers(0, 3)))


BATCHES_COVER = _dealt_rows()
PADDING_NO_TARGET = st.builds(Rows, rows=rows_of(1, 3))


class Together(Recipe):
    """Two rows of ids that share a batch."""

    rows: Annotated[tuple[IdRow, ...], Field(min_length=2, max_length=2, strict=False)]


PADDING_SAME_LOSS = st.builds(Together, rows=st.lists(token_rows(most=14), min_size=2, max_size=2).map(tuple))


class Packed(Rows):
    """Rows that share sequences, or do not, and how these are dealt out."""

    packing: bool
    length: Annotated[int, Field(ge=8)]
    batch_size: Annotated[int, Field(ge=1)]
    accumulation: Annotated[int, Field(ge=1)]

    @property
    def settings(self) -> dict[str, object]:
        """As the trainer is told."""
        return {
            **PLAIN,
            "training.packing": self.packing,
            "tokens.max_length": self.length,
            "training.batch_size": self.batch_size,
            "training.gradient_accumulation_steps": self.accumulation,
        }


def _packed(packing: Sequence[bool]) -> st.SearchStrategy[Packed]:
    return st.builds(
        Packed,
        rows=rows_of(2, 5),
        packing=st.sampled_from(packing),
        length=st.integers(100, 200),
        batch_size=st.integers(1, 2),
        accumulation=st.integers(1, 2),
    )


PACKING_COVER = _packed([True])
PACKING_SHARES = _packed([True])


class Shared(Recipe):
    """Rows that share one sequence."""

    rows: Annotated[tuple[IdRow, ...], Field(min_length=2, max_length=3, strict=False)]


PACKING_APART = st.builds(Shared, rows=st.lists(token_rows(9), min_size=2, max_size=3).map(tuple))
BATCHES_SIZES = _packed([False, True])


class PackedTexts(Packed):
    """Plain texts that share sequences."""

    @property
    def values(self) -> list[dict[str, str]]:
        """The answers alone, as texts."""
        return [{"text": row.completion} for row in self.rows]


PACKING_TEXTS = st.builds(
    PackedTexts,
    rows=rows_of(2, 5),
    packing=st.sampled_from([True]),
    length=st.integers(100, 200),
    batch_size=st.integers(1, 2),
    accumulation=st.integers(1, 2),
)
