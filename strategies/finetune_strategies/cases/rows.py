"""Cases that laws share: conversations, rows and settings, small and of unequal sizes."""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from hypothesis import strategies as st
from pydantic import Field

from finetune_strategies.recipes import ModelRecipe, Recipe

TINY = ModelRecipe()
"""One layer of twelve numbers; two heads share one of keys and values, and no size is the other's square."""
_LETTERS = st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])
TEXTS = st.text(_LETTERS, min_size=1, max_size=20).map(str.strip).filter(bool)
"""What somebody says: any letters, nothing at the edges that a template may strip."""
PLAIN: Mapping[str, Any] = {
    "template.name": "chatml",
    "tokens.max_length": 256,
    "adapter.rank": 2,
    "adapter.alpha": 6.0,
}
"""Settings that the tiny model can have; the adapter's scale is 3, for one of 1 hides faults."""

Word = Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9_]([A-Za-z0-9_.]*[A-Za-z0-9_])?$")]
"""A plain word, such as the name of a layer or a setting: it leads nowhere when it becomes a part of a path."""


def one_of(words: Iterable[str]) -> str:
    """The pattern of these words alone: what a case calls by a name must be among the few that a law knows."""
    return f"^({'|'.join(map(re.escape, words))})$"


Template = Literal["chatml", "alpaca", "tokenizer"]
Said = Annotated[str, Field(max_length=500)]


class Pair(Recipe):
    """A question and its answer, as a row of a data file."""

    prompt: Said
    completion: Said


class Rows(Recipe):
    """Rows to train on."""

    rows: Annotated[tuple[Pair, ...], Field(min_length=1, strict=False)]

    @property
    def values(self) -> list[dict[str, str]]:
        """The rows as data files have them."""
        return [row.model_dump() for row in self.rows]


class IdRow(Recipe):
    """Ids that the tiny model knows, the last so many of which are an answer."""

    ids: Annotated[tuple[int, ...], Field(min_length=2, max_length=60, strict=False)]
    answer: Annotated[int, Field(ge=1)]

    @property
    def value(self) -> dict[str, Any]:
        """The row as a question has it."""
        prompt = len(self.ids) - self.answer
        return {"ids": list(self.ids), "targets": [place >= prompt for place in range(len(self.ids))]}


PAIRS = st.builds(Pair, prompt=TEXTS, completion=TEXTS)
_BYTES = st.integers(6, 255)


@st.composite
def token_rows(draw: st.DrawFn, most: int = 24) -> IdRow:
    """A row of 2 to `most` tokens, none of them a control token, and an answer that leaves one token before it."""
    ids = draw(st.lists(_BYTES, min_size=2, max_size=most))
    return IdRow(ids=tuple(ids), answer=draw(st.integers(1, len(ids) - 1)))


def rows_of(least: int, most: int) -> st.SearchStrategy[tuple[Pair, ...]]:
    """So many rows, no two of them alike."""
    return st.lists(PAIRS, min_size=least, max_size=most, unique=True).map(tuple)
