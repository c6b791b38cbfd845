"""Conversations, limits of length and batches whose trained tokens are known."""

from typing import Annotated, Any, Literal

from hypothesis import strategies as st
from pydantic import Field

from finetune_strategies.cases.dialogues import RICH, Dialogue, dialogues
from finetune_strategies.cases.rows import TEXTS, IdRow, Pair, Rows, rows_of, token_rows
from finetune_strategies.recipes import FEWEST_WORDS, Recipe


class Answered(Recipe):
    """Conversations, each in a row of its own."""

    conversations: Annotated[tuple[Dialogue, ...], Field(min_length=1, max_length=3, strict=False)]

    @property
    def values(self) -> list[dict[str, Any]]:
        """The rows as data files have them: a pair where it is one, messages elsewhere."""
        return [
            {"messages": talk.messages}
            if talk.system is not None or len(talk.turns) > 1
            else talk.turns[0].model_dump()
            for talk in self.conversations
        ]


MASK_ANSWERS = st.builds(Answered, conversations=st.lists(dialogues(TEXTS), min_size=1, max_size=3).map(tuple))


Mark = Literal["", "weight 0", "weight 1", "train false", "train true"]
_MARKS: dict[Mark, dict[str, Any]] = {
    "": {},
    "weight 0": {"weight": 0},
    "weight 1": {"weight": 1},
    "train false": {"train": False},
    "train true": {"train": True},
}


class Weighed(Recipe):
    """A conversation, and what its row says of each answer."""

    talk: Dialogue
    marks: Annotated[tuple[Mark, ...], Field(min_length=1, strict=False)]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages with their marks."""
        marks = iter(self.marks)
        return [
            {**message, **_MARKS[next(marks)]} if message["role"] == "assistant" else message
            for message in self.talk.messages
        ]

    @property
    def learned(self) -> list[str]:
        """The answers that are learned."""
        pairs = zip(self.talk.turns, self.marks, strict=True)
        return [turn.completion for turn, mark in pairs if mark not in ("weight 0", "train false")]


@st.composite
def _weighed(draw: st.DrawFn) -> Weighed:
    """At least two answers, one of them learned."""
    talk = draw(dialogues(TEXTS, least=2))
    marks = [draw(st.sampled_from(tuple(_MARKS))) for _ in talk.turns]
    marks[draw(st.integers(0, len(marks) - 1))] = draw(st.sampled_from(("", "weight 1", "train true")))
    return Weighed(talk=talk, marks=tuple(marks))


MASK_WEIGHTS = _weighed()


MASK_BESIDE = RICH


class Placed(Rows):
    """Rows, and where their template comes from."""

    place: Literal["tokenizer", "file"]


MASK_TEMPLATE = st.builds(Placed, rows=rows_of(1, 2), place=st.sampled_from(("tokenizer", "file")))
Policy = Literal["drop", "truncate_prompt", "split"]


class Limited(Rows):
    """Rows, a policy for those that are too long, and how far below the longest row the limit is."""

    policy: Policy
    below: Annotated[int, Field(ge=0)]


_LONGER = st.builds(Pair, prompt=TEXTS.map(lambda text: f"longer than that: {text}"), completion=TEXTS)
_SHORT = Pair(prompt="a", completion="b")


def _limited(below: st.SearchStrategy[int], *policies: Policy) -> st.SearchStrategy[Limited]:
    rows = st.lists(_LONGER, min_size=1, max_size=2).map(lambda rows: (_SHORT, *rows))
    return st.builds(Limited, rows=rows, policy=st.sampled_from(policies), below=below)


MASK_FITS = _limited(st.just(0), "drop", "truncate_prompt", "split")
MASK_WHOLE = _limited(st.integers(1, 9), "drop", "split")
MASK_CUT = _limited(st.integers(1, 12), "truncate_prompt")


class Long(Recipe):
    """A text, and a limit."""

    text: str
    most: Annotated[int, Field(ge=8)]


MASK_PIECES = st.builds(Long, text=TEXTS.map(lambda text: f"{text} and so on, and on, and on"), most=st.integers(8, 17))


class Batched(Recipe):
    """Rows of one batch."""

    rows: Annotated[tuple[IdRow, ...], Field(min_length=1, max_length=3, strict=False)]


@st.composite
def _any_rows(draw: st.DrawFn) -> Batched:
    """Rows of any tokens, those for padding and for ends among them."""
    tokens = st.one_of(st.integers(0, 3), st.integers(0, FEWEST_WORDS - 1))
    ids = st.lists(tokens, min_size=2, max_size=12)
    drawn = draw(st.lists(ids, min_size=1, max_size=3))
    rows = [IdRow(ids=tuple(each), answer=draw(st.integers(1, len(each) - 1))) for each in drawn]
    return Batched(rows=tuple(rows))


MASK_MEASURED = _any_rows()


class Sized(Recipe):
    """A limit of length; of two texts one reaches it, and one is a token longer."""

    most: Annotated[int, Field(ge=8, le=50_000)]


MASK_LIMITS = st.builds(Sized, most=st.sampled_from([40_000, 8, 33_000]))


class Untaught(Recipe):
    """A row, and one beside it of which nothing is to be learned, before it or after it."""

    row: IdRow
    other: IdRow
    first: bool

    @property
    def values(self) -> list[dict[str, Any]]:
        """Both rows as a question has them."""
        silent = {**self.other.value, "targets": [False] * len(self.other.ids)}
        return [silent, self.row.value] if self.first else [self.row.value, silent]


MASK_NONE = st.builds(Untaught, row=token_rows(9), other=token_rows(14), first=st.booleans())
