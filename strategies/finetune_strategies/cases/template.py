"""Conversations, plain texts and beginnings, each with its template."""

from typing import Annotated, Any, Literal, get_args

from hypothesis import strategies as st
from pydantic import Field

from finetune_strategies.cases.dialogues import EDGED, RICH, WORDS, Dialogue, Name, dialogues
from finetune_strategies.cases.rows import PAIRS, TEXTS, TINY, Pair, Rows, Said, Template, rows_of
from finetune_strategies.recipes import FEWEST_WORDS, MERGES, ModelRecipe, Recipe

_TEMPLATES = ("chatml", "alpaca", "tokenizer")
TEMPLATE_BYTES = dialogues(WORDS, templates=_TEMPLATES)
TEMPLATE_PROMPT = dialogues(TEXTS, templates=_TEMPLATES)
TEMPLATE_WORDS = dialogues(WORDS, templates=_TEMPLATES)
TEMPLATE_TRAINED = dialogues(WORDS, templates=_TEMPLATES)
TEMPLATE_BESIDE = RICH


class Spoken(Recipe):
    """A question and its answer, and what may be said before and between, all of it written like markup."""

    pair: Pair
    system: Said | None = None
    earlier: Pair | None = None
    result: Said | None = None

    @property
    def value(self) -> dict[str, Any]:
        """The row: a pair where there is nothing else."""
        if self.system is None and self.earlier is None and self.result is None:
            return self.pair.model_dump()
        spoken = [("system", self.system)]
        spoken += [("user", self.earlier.prompt), ("assistant", self.earlier.completion)] if self.earlier else []
        spoken += [("user", self.pair.prompt), ("tool", self.result), ("assistant", self.pair.completion)]
        return {"messages": [{"role": role, "content": text} for role, text in spoken if text is not None]}

    @property
    def plain(self) -> "Spoken":
        """The same with letters for words."""
        letters = Pair(prompt="a", completion="b")
        system, result = ("a" if text is not None else None for text in (self.system, self.result))
        return Spoken(pair=letters, system=system, earlier=letters if self.earlier else None, result=result)


_SPOKEN = st.builds(Pair, prompt=WORDS, completion=WORDS)
_OR_NONE = st.none() | WORDS
TEMPLATE_INERT = st.builds(Spoken, pair=_SPOKEN, system=_OR_NONE, earlier=st.none() | _SPOKEN, result=_OR_NONE)


class Encoded(Recipe):
    """A conversation, and a model whose tokenizer makes one token of several characters."""

    model: ModelRecipe
    talk: Dialogue

    @property
    def messages(self) -> list[dict[str, str]]:
        """Its messages."""
        return self.talk.messages


_SIZE = FEWEST_WORDS + len(MERGES)
_MERGING = [
    ModelRecipe(words=words, takes=takes, vocabulary=_SIZE)
    for words in ("merged", "spaced")
    for takes in ("", "left", "right")
]
_MERGEABLE = st.text("abc \n\té<|user", max_size=10)
_TURN = st.builds(Pair, prompt=_MERGEABLE, completion=_MERGEABLE)
_LAST = st.builds(Pair, prompt=_MERGEABLE, completion=_MERGEABLE.filter(str.strip))
MERGED = st.builds(
    Encoded,
    model=st.sampled_from(_MERGING),
    talk=st.builds(
        Dialogue,
        system=st.none() | _MERGEABLE,
        turns=st.tuples(_LAST) | st.tuples(_TURN, _LAST),
        template=st.just("tokenizer"),
    ),
)


class Varied(Recipe):
    """A pair whose row sets a variable."""

    pair: Pair
    name: Name
    text: Said

    @property
    def variables(self) -> dict[str, str]:
        """What it sets."""
        return {self.name: self.text}

    @property
    def messages(self) -> list[dict[str, str]]:
        """Its messages."""
        return Dialogue(system=None, turns=(self.pair,)).messages

    @property
    def value(self) -> dict[str, Any]:
        """The row as a data file has it."""
        return {"messages": self.messages, "chat_template_kwargs": self.variables}


VARIABLES = st.builds(Varied, pair=PAIRS, name=st.sampled_from(("date_string", "date_sting")), text=TEXTS)


class Refused(Recipe):
    """Conversations, one of which has its system message in a place that the template refuses."""

    talks: Annotated[tuple[Dialogue, ...], Field(min_length=2, strict=False)]
    place: Annotated[int, Field(ge=0)]

    @property
    def values(self) -> list[dict[str, Any]]:
        """The rows as data files have them."""
        late = {"role": "system", "content": "late"}
        rows = [list(talk.messages) for talk in self.talks]
        rows[self.place] = [*rows[self.place][:-1], late, rows[self.place][-1]]
        return [{"messages": messages} for messages in rows]


REFUSED = st.lists(dialogues(TEXTS), min_size=2, max_size=4).flatmap(
    lambda talks: st.builds(Refused, talks=st.just(tuple(talks)), place=st.integers(0, len(talks) - 1))
)


class InParts(Recipe):
    """A conversation whose texts are given in parts, one for each line."""

    talk: Dialogue

    @property
    def messages(self) -> list[dict[str, str]]:
        """Its messages with their texts in one piece."""
        return self.talk.messages

    @property
    def in_parts(self) -> list[dict[str, Any]]:
        """Its messages with their texts in parts."""
        return [
            {**message, "content": [{"type": "text", "text": line} for line in message["content"].split("\n")]}
            for message in self.messages
        ]


_LINES = st.lists(EDGED | WORDS, min_size=1, max_size=2).map("\n".join)
PARTS = st.builds(InParts, talk=dialogues(_LINES))


class PlainText(Recipe):
    """A text to train on."""

    text: str


TEMPLATE_ENDS = st.builds(PlainText, text=WORDS)
_ROOM = FEWEST_WORDS + 1
BEGINNINGS = tuple(ModelRecipe(bos=bos, vocabulary=_ROOM) for bos in ("known", "added", "configured", "written"))


class Begun(Recipe):
    """A model that may want a begin-of-text token, and a row to train on."""

    model: ModelRecipe
    pair: Pair
    template: Template


_EDGED_PAIRS = st.builds(Pair, prompt=EDGED | st.just(""), completion=EDGED)
BEGUN = st.builds(
    Begun,
    model=st.sampled_from((TINY, *BEGINNINGS)),
    pair=_EDGED_PAIRS,
    template=st.sampled_from(("chatml", "tokenizer")),
)


class Ended(Rows):
    """Rows, and a template."""

    template: Template


TEMPLATE_STOPS = st.builds(Ended, rows=rows_of(1, 2), template=st.sampled_from(_TEMPLATES))
TEMPLATE_TRAVELS = st.builds(Ended, rows=rows_of(1, 1), template=st.sampled_from(("alpaca", "chatml")))


Block = Literal["image", "image_url", "input_audio", "thinking", "document"]


class Blocked(Recipe):
    """A pair of which the question or the answer has a part that is no plain text, with a word in it."""

    pair: Pair
    block: Block
    asked: bool
    word: Literal["Xylographie"] = "Xylographie"

    @property
    def value(self) -> dict[str, Any]:
        """The row as a data file has it."""
        texts = [("user", self.pair.prompt), ("assistant", self.pair.completion)]
        parts = [[{"type": "text", "text": text}] for _, text in texts]
        parts[not self.asked].append({"type": self.block, self.block: self.word})
        return {"messages": [{"role": role, "content": part} for (role, _), part in zip(texts, parts, strict=True)]}


BLOCKED = st.builds(Blocked, pair=PAIRS, block=st.sampled_from(get_args(Block)), asked=st.booleans())
