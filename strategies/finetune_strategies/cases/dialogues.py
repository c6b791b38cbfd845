"""Cases about what is said: conversations of several turns, words that templates stumble over, and their tokens."""

from collections.abc import Sequence
from typing import Annotated, Any

from hypothesis import strategies as st
from pydantic import Field

from finetune_strategies.cases.rows import TEXTS, Pair, Said, Template
from finetune_strategies.recipes import ModelRecipe, Recipe

CONTROL = ("<|im_start|>", "<|im_end|>", "</s>", "<|pad|>")
_STUMBLES = ("{}", "{{ x }}", "{INPUT}", "%s", "<|im_end|>", "</s>", "<|im_start|>assistant", "[INST]", "### Response:")
WORDS = st.lists(TEXTS | st.sampled_from(_STUMBLES), min_size=1, max_size=3).map(" ".join)
"""What somebody says that looks like the markup of a template."""
TOOLS = ModelRecipe(template="tools")
"""Its template shows tools, thoughts, calls and results."""
_EDGES = st.sampled_from(("", "", " ", "\n", "  ", "\t"))
EDGED = st.builds("{}{}{}".format, _EDGES, TEXTS, _EDGES)
"""What somebody says with white space at its edges."""


class Dialogue(Recipe):
    """A conversation: what its system is told, if anything, and its turns."""

    system: str | None
    turns: Annotated[tuple[Pair, ...], Field(min_length=1, strict=False)]
    template: Template = "chatml"

    @property
    def messages(self) -> list[dict[str, str]]:
        """Its messages, the last of which is an answer."""
        found = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            found += [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.completion}]
        return found


def dialogues(words: st.SearchStrategy[str], *, least: int = 1, templates: Sequence[str] = ("chatml",)) -> Any:
    """Conversations of at least so many turns, and a template for each."""
    turns = st.lists(st.builds(Pair, prompt=words, completion=words), min_size=least, max_size=3).map(tuple)
    return st.builds(Dialogue, system=st.none() | words, turns=turns, template=st.sampled_from(tuple(templates)))


Name = Annotated[str, Field(pattern="^[a-z_]{1,12}$")]


class Call(Recipe):
    """A call of a tool, and what came of it."""

    name: Name
    arguments: dict[Name, Said]
    result: Said

    @property
    def asked(self) -> dict[str, Any]:
        """The call as a message has it."""
        return {"id": "abcdefghi", "type": "function", "function": {"name": self.name, "arguments": self.arguments}}

    @property
    def tool(self) -> dict[str, Any]:
        """The tool as a row has it."""
        known = {"type": "object", "properties": {name: {"type": "string"} for name in self.arguments}}
        return {"type": "function", "function": {"name": self.name, "parameters": known}}


class RichTurn(Recipe):
    """A question, what is thought and called on the way, and an answer."""

    question: Said
    thoughts: tuple[Said, Said]
    calls: Annotated[tuple[Call, ...], Field(strict=False)]
    answer: Said


class Rich(Recipe):
    """A conversation with more than texts; there are no thoughts where they are empty."""

    system: Said | None
    turns: Annotated[tuple[RichTurn, ...], Field(min_length=1, strict=False)]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Its messages as data files have them."""
        found: list[dict[str, Any]] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            found.append({"role": "user", "content": turn.question})
            thoughts = [{"reasoning_content": thought} if thought else {} for thought in turn.thoughts]
            if turn.calls:
                calls = [call.asked for call in turn.calls]
                found.append({"role": "assistant", "content": "", **thoughts[0], "tool_calls": calls})
                found += [{"role": "tool", "content": call.result} for call in turn.calls]
            found.append({"role": "assistant", "content": turn.answer, **thoughts[1]})
        return found

    @property
    def given(self) -> dict[str, Any]:
        """What a template is given beside the messages: the tools that are called, if any."""
        tools = {call.name: call.tool for turn in self.turns for call in turn.calls}
        return {"tools": list(tools.values())} if tools else {}

    @property
    def value(self) -> dict[str, Any]:
        """The row as a data file has it."""
        return {"messages": self.messages, **self.given}

    @property
    def words(self) -> list[str]:
        """Whatever is said in it, but for the arguments of calls, which are shown as JSON."""
        found = [self.system or ""]
        for turn in self.turns:
            found += [turn.question, turn.answer, turn.thoughts[1], *(call.result for call in turn.calls)]
            found += [turn.thoughts[0]] if turn.calls else []
        return [word for word in found if word]


_NAMES = st.sampled_from(("look_up", "add", "send"))
_RESULTS = EDGED | WORDS | st.just("")
_CALLS = st.builds(Call, name=_NAMES, arguments=st.dictionaries(_NAMES, EDGED, max_size=2), result=_RESULTS)
_THOUGHTS = st.just("") | EDGED
_TURNS = st.builds(
    RichTurn,
    question=EDGED | WORDS | st.just(""),
    thoughts=st.tuples(_THOUGHTS, _THOUGHTS),
    calls=st.lists(_CALLS, max_size=2).map(tuple),
    answer=EDGED | WORDS,
)
_RICH = st.builds(Rich, system=st.none() | EDGED, turns=st.lists(_TURNS, min_size=1, max_size=2).map(tuple))
RICH = _RICH.filter(lambda rich: len(str(rich.value).encode()) < 900)
"""Conversations with more than texts, of fewer tokens than the tiny model reads."""
