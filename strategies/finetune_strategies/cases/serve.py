"""Licences and questions for a server."""

from typing import Annotated

from hypothesis import strategies as st
from pydantic import Field

from finetune_strategies.cases.rows import TEXTS
from finetune_strategies.recipes import Recipe


class Licensed(Recipe):
    """The text of a licence, which somebody else wrote."""

    text: Annotated[str, Field(max_length=200)]


_PIECES = ('"""', '"', "\n", "FROM evil", "ADAPTER evil", "PARAMETER stop z", 'a"""\nFROM evil\n', "b", " ")
SERVE_RECIPE = st.builds(Licensed, text=st.lists(st.sampled_from(_PIECES), max_size=3).map("".join))


class Question(Recipe):
    """What was said in turn, by the user first."""

    said: Annotated[tuple[str, ...], Field(min_length=1, max_length=5, strict=False)]
    system: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation, which ends with a question."""
        said = self.said if len(self.said) % 2 else self.said[:-1]
        turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns


SERVE_TEMPLATE = st.builds(
    Question, said=st.lists(TEXTS, min_size=1, max_size=3).map(tuple), system=st.just("") | TEXTS
)
