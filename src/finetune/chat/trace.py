"""Follows what a template does with texts that it does not see: which it shows where, and what it asks of them.

A template is rendered once with a stand-in for each text. What it shows is then known to be markup and those texts,
whole or stripped, for every conversation of the same roles of which the template's questions have the same answers.
A stand-in is no text: whatever Jinja would do with it that is not followed here fails, and so does the trace.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from operator import contains, eq
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.runtime import Macro
from jinja2.tests import TESTS

from finetune.chat.budget import Meter, allowance
from finetune.chat.sandbox import MeteredContext, Sandbox, code_of
from finetune.chat.template_words import FILTER_TABLE, TEST_TABLE, Helper

_PLACE = re.compile("\ue002([0-9]+)\ue003")
_SIDES = ("lstrip", "rstrip")
_STRIPS = ("strip", *_SIDES)
_OF_KIND = (
    *("boolean", "defined", "false", "float", "integer", "iterable", "mapping", "none", "number", "sequence"),
    *("string", "true", "undefined"),
)
"""Tests of what kind a value is: they answer alike for every text."""
_QUESTIONS: Mapping[str, Callable[[str, str], bool]] = {
    "is": eq,
    "has": contains,
    "startswith": str.startswith,
    "endswith": str.endswith,
    "is any": lambda text, _: bool(text),
}


class _UntraceableError(Exception):
    """The template does with a text what is not followed."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """The text of one message as it is shown: `ways` are the strips it goes through, with the letters of each."""

    index: int
    ways: tuple[tuple[str, str | None], ...] = ()

    def then(self, way: str, letters: str | None) -> "Leaf":
        """The same, stripped once more."""
        *before, (last, of) = self.ways or (("", ""),)
        if last == "strip" and (of == letters or (of is None and letters and letters.isspace())):
            return self
        if last and of == letters:
            return self if way == last else Leaf(self.index, (*before, ("strip", letters)))
        return Leaf(self.index, (*self.ways, (way, letters)))

    @property
    def is_simple(self) -> bool:
        """Whether it is the text as it is, or without white space or line ends around it."""
        return not self.ways or (len(self.ways) == 1 and self.ways[0][1] in (None, "\n"))

    def of(self, texts: Sequence[str]) -> str:
        """Of these texts."""
        text = texts[self.index]
        for way, letters in self.ways:
            text = getattr(text, way)(letters)
        return text


@dataclass(frozen=True, slots=True)
class Trace:
    """What a template shows, and the answers to its questions on which that depends."""

    parts: tuple[str | Leaf, ...]
    answers: tuple[tuple[Leaf, str, str, bool], ...]

    def holds_for(self, texts: Sequence[str]) -> bool:
        """Whether the template would do the same with these texts."""
        return all(_QUESTIONS[name](leaf.of(texts), other) is said for leaf, name, other, said in self.answers)

    def shown(self, show: Callable[[Leaf], str]) -> str:
        """What it shows, each text in it as `show` has it."""
        return "".join(part if isinstance(part, str) else show(part) for part in self.parts)


class _HiddenTexts:
    """The texts of one conversation, and what the template has asked of them."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.answers: dict[tuple[Leaf, str, str], bool] = {}
        self._places: list[Leaf] = []

    def ask(self, leaf: Leaf, question: str, other: object = "") -> bool:
        if type(other) is not str:
            raise _UntraceableError
        said = _QUESTIONS[question](leaf.of(self.texts), other)
        self.answers[leaf, question, other] = said
        return said

    def place(self, leaf: Leaf) -> str:
        """What stands for a text where it is shown."""
        self._places.append(leaf)
        return f"\ue002{len(self._places) - 1}\ue003"

    def read(self, text: str) -> tuple[str | Leaf, ...]:
        """The parts of what was shown."""
        pieces = enumerate(_PLACE.split(text))
        return tuple(self._places[int(each)] if number % 2 else each for number, each in pieces if each)


def _refuse(*_: object) -> NoReturn:
    raise _UntraceableError


class _StandIn:
    """Stands for text that a template does not see: markup and texts of messages, one after the other."""

    __slots__ = ("asked", "parts")
    __hash__ = __str__ = __repr__ = __format__ = __iter__ = __len__ = __getitem__ = _refuse

    def __init__(self, asked: _HiddenTexts, parts: tuple[str | Leaf, ...]) -> None:
        self.asked, self.parts = asked, parts

    def __bool__(self) -> bool:
        return any(isinstance(part, str) or self.asked.ask(part, "is any") for part in self.parts)

    def __eq__(self, other: object) -> bool:
        if other is None or isinstance(other, bool | int | float | list | tuple | dict):
            return False
        return self.asked.ask(self.leaf, "is", other)

    def __contains__(self, other: object) -> bool:
        return self.asked.ask(self.leaf, "has", other)

    @property
    def leaf(self) -> Leaf:
        """The one text that it is."""
        only = self.parts[0]
        if len(self.parts) > 1 or isinstance(only, str):
            raise _UntraceableError
        return only

    def call(self, method: str, *given: Any) -> Any:
        """A method of it as of a text."""
        if method in _STRIPS and all(letters is None or type(letters) is str for letters in given):
            return self._stripped(method, *given)
        if method in ("startswith", "endswith") and len(given) == 1:
            return self.asked.ask(self.leaf, method, *given)
        raise _UntraceableError

    def _stripped(self, way: str, letters: str | None = None) -> Any:
        if len(self.parts) == 1:
            leaf = self.leaf
            return _StandIn(self.asked, (leaf.then(way, letters),))
        parts = list(self.parts)
        for end, side in zip((0, -1), _SIDES, strict=True):
            while parts and way in ("strip", side):
                part = parts[end]
                if isinstance(part, str):
                    parts[end] = stripped = getattr(part, side)(letters)
                    found = bool(stripped)
                else:
                    parts[end] = leaf = part.then(side, letters)
                    found = self.asked.ask(leaf, "is any")
                if found:
                    break
                del parts[end]
        return _StandIn(self.asked, tuple(parts)) if parts else ""


@dataclass(frozen=True, slots=True)
class _Method:
    owner: _StandIn
    name: str


def _joined(meter: Meter, *parts: object) -> Any:
    found: list[str | Leaf] = []
    asked = None
    for part in parts:
        if isinstance(part, _StandIn):
            asked = part.asked
            found += part.parts
        elif shown := meter.shown(part):
            found.append(shown)
    return "".join(map(str, found)) if asked is None else _StandIn(asked, tuple(found))


def _looked(_: Meter, value: object, __: int) -> Any:
    return value  # it was paid for when this conversation was rendered, and a stand-in in it compares itself


def _finalize(context: Any, value: Any) -> str:
    if isinstance(value, _StandIn):
        return "".join(part if isinstance(part, str) else value.asked.place(part) for part in value.parts)
    text: str = context.meter.shown(value)
    return text


def _followed(name: str, word: Callable[..., Any], known: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that does with a stand-in what is `known`."""

    @wraps(word)
    def follow(*given: Any, **named: Any) -> Any:
        if any(isinstance(each, _StandIn) for each in (*given, *named.values())):
            return known(name, word, *given[hasattr(word, "jinja_pass_arg") :], **named)
        return word(*given, **named)

    return follow


def _filtered(name: str, _: object, value: Any, *given: Any, **named: Any) -> Any:
    if name == "trim" and isinstance(value, _StandIn) and not named:
        return value.call("strip", *given)
    if name == "string" and not given:
        return value
    if name in ("d", "default") and isinstance(value, _StandIn) and not given[1:] and "boolean" not in named:
        return value
    raise _UntraceableError


def _tested(name: str, _: object, value: Any, *given: Any) -> Any:
    test: Any = TESTS[name]
    if name in _OF_KIND:
        return test("text")
    if name in ("eq", "==", "equalto", "ne", "!="):
        return test(value, *given)
    raise _UntraceableError


class _Tracer(Sandbox):
    """The sandbox, which follows what becomes of stand-ins."""

    concatenated = Helper(_joined)
    looked = Helper(_looked)

    def __init__(self) -> None:
        super().__init__()
        self.finalize = _finalize
        self.filters = {name: _followed(name, word, _filtered) for name, word in FILTER_TABLE.items()}
        self.tests = {name: _followed(name, word, _tested) for name, word in TEST_TABLE.items()}

    def getattr(self, obj: object, attribute: str) -> Any:
        """As of a text: its methods."""
        return _Method(obj, attribute) if isinstance(obj, _StandIn) else super().getattr(obj, attribute)

    def getitem(self, obj: object, argument: object) -> Any:
        """No letter of a text is followed, nor where a text leads."""
        if isinstance(obj, _StandIn | _Method) or isinstance(argument, _StandIn | _Method):
            raise _UntraceableError
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """What a macro shows may hold texts."""
        if isinstance(__obj, _Method):
            return __obj.owner.call(__obj.name, *args)
        made = super().call(__context, __obj, *args, **kwargs)
        if isinstance(__obj, Macro) and _PLACE.search(made):
            asked: _HiddenTexts = __context.asked
            return _StandIn(asked, asked.read(made))
        return made

    def call_binop(self, context: Any, operator: str, left: object, right: object) -> Any:
        """Texts are put together, and nothing else is calculated with them."""
        if not isinstance(left, _StandIn) and not isinstance(right, _StandIn):
            return super().call_binop(context, operator, left, right)
        if operator != "+" or not all(isinstance(each, str | _StandIn) for each in (left, right)):
            raise _UntraceableError
        return _joined(context.meter, left, right)


class _TracedContext(MeteredContext):
    asked: _HiddenTexts


class Tracer:
    """One template, to be followed."""

    def __init__(self, name: str, source: str) -> None:
        environment = _Tracer()
        environment.context_class = _TracedContext
        # What these make of a text is text to Python itself, which asks nobody.
        unfit = nodes.AssignBlock, nodes.FilterBlock
        self._template = None
        if next(environment.parse(source).find_all(unfit), None) is None:
            code = code_of(name, source)
            self._template = Template.from_code(environment, code, environment.make_globals(None))

    def follow(self, given: Mapping[str, Any], texts: Sequence[str], hidden: Sequence[bool]) -> Trace | None:
        """The trace of a render with these variables, where those texts are hidden; None where it is not followed.

        `given` has the messages, with `texts` in them as `content`, or as its only part.
        """
        if self._template is None:
            return None
        asked = _HiddenTexts(texts)
        messages = [dict(each) for each in given["messages"]]
        for index, (turn, hides) in enumerate(zip(messages, hidden, strict=True)):
            if hides:
                stand_in = _StandIn(asked, (Leaf(index),))
                parts = isinstance(turn["content"], list)
                turn["content"] = [{"type": "text", "text": stand_in}] if parts else stand_in
        variables = {name: value for name, value in given.items() if name != "today"}
        context = self._template.new_context({**variables, "messages": messages})
        assert isinstance(context, _TracedContext)
        context.meter, context.asked = Meter(allowance(given["messages"]), given["today"]), asked
        try:
            shown = asked.read("".join(self._template.root_render_func(context)))
        except Exception:  # whatever Python and Jinja make of what is no text
            return None
        return Trace(shown, tuple((*question, said) for question, said in asked.answers.items()))
