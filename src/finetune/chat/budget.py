"""How much a template may do: one account a render, counted and never timed, so that it ends alike on every machine.

The unit is one character of text copied or looked through. A step of the template (a node of its syntax tree) and an
element of a list count as 64: they take about that much longer, and about that much more memory. Every loop, call,
filter, comparison and sum pays before it works, so an account that is empty stops a template before memory is taken.
"""

from collections.abc import ItemsView, KeysView, Mapping, Sequence, ValuesView
from datetime import date
from typing import Any

from jinja2.runtime import Undefined

from finetune.config.schema import DAY

BASE = 2_000_000
"""Paid in before any message: 31,000 steps or 2 MB of text. Of 72 templates in use none takes a fifth of it for a call
of tools in five messages, which is where they do the most besides reading messages."""
PER_MESSAGE = 1_000_000
"""15,600 steps for each message. Most templates take under 1,000; Gemma 4 looks back at all earlier messages for each
one, and takes 5,500 of them in a conversation of 400."""
PER_CHARACTER = 32
"""A template may copy each character of the messages 32 times: the hungriest of those 72 copies them 11 times."""
STEP = 64
"""One step of the template, one element of a list."""
CALL = 256
"""A call of a macro, a method or a filter, above its steps."""
MAX_DEPTH = 40
"""How deep macros may call macros; Python itself gives up at about 150."""
MAX_NESTING = 60
"""How deep lists and dicts may nest where they are shown or compared; JSON schemas of tools nest to about 10."""
MAX_NUMBER = 2**64
"""Whole numbers beyond this are refused: their digits are the cheapest way to fill memory."""

SHOWN_GROWTH = 10
"""`\\U00010000` for one character: the most that showing a list, or escaping for JSON, makes of it."""

_SCALARS = (bool, int, float, type(None), Undefined)


class UnsafeTemplateError(Exception):
    """The template does something that no chat template needs to do, or more of it than its messages call for."""


def allowance(messages: Sequence[Mapping[str, Any]]) -> int:
    """What a template may spend on these messages: it grows with their number and their length."""
    values = [value for message in messages for value in message.values()]
    characters = sum(len(value) if isinstance(value, str) else weight(value, BASE) for value in values)
    return BASE + PER_MESSAGE * len(messages) + PER_CHARACTER * characters


class Meter:
    """The account of one render, and the day that it prints as today."""

    __slots__ = ("_depth", "allowed", "left", "today")

    def __init__(self, allowed: int, today: date = DAY) -> None:
        self.allowed = self.left = allowed
        self.today = today
        self._depth = 0

    def spend(self, units: int) -> None:
        """Pay for work, or raise UnsafeTemplateError."""
        if units > self.left:
            self.afford(units)
        self.left -= units

    def afford(self, units: int) -> None:
        """Raise UnsafeTemplateError unless a result of this size could be paid for."""
        if units > self.left:
            raise UnsafeTemplateError(
                f"it takes more work than such messages need (over {self.allowed:,} characters and steps)"
            )

    def look(self, value: object, times: int = 1, *, indent: int = 0) -> int:
        """Pay for going through all of a value `times` times; returns what one time costs."""
        units = weight(value, self.left, indent=indent)
        self.spend(units * times)
        return units

    def shown(self, value: object) -> str:
        """The value as text; anything but text is paid for."""
        if isinstance(value, str):
            return value
        self.afford(SHOWN_GROWTH * self.look(value))
        text = str(value)
        self.spend(len(text))
        return text

    def keep(self, value: object) -> Any:
        """Pay for a value that was made; a stream is drawn into a list first and handed on as a stream again."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, list | tuple | dict):
            self.spend(STEP * len(value) + sum(len(item) for item in value if isinstance(item, str)))
        elif isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise UnsafeTemplateError("it makes a number of more than 64 bits")
        elif hasattr(value, "__next__"):
            return iter(self.drawn(value))
        return value

    def drawn(self, stream: Any) -> list[Any]:
        """Everything a stream gives, each element paid for as it comes."""
        found = []
        for item in stream:
            self.spend(STEP)
            found.append(item)
        return found

    def enter(self) -> None:
        """Go into a macro, or raise UnsafeTemplateError where macros are too deep already."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UnsafeTemplateError(f"its macros call each other more than {MAX_DEPTH} deep")

    def leave(self) -> None:
        """Come out of a macro."""
        self._depth -= 1


def weight(value: object, limit: int, *, indent: int = 0) -> int:
    """How many units it takes to go through all of a value, or anything above `limit` when it is more than that.

    A list that holds another one ten times counts it ten times: that is what showing or comparing it costs.

    Raises:
        UnsafeTemplateError: the value nests too deep, or holds something that is not plain data.
    """
    total = 0
    pending: list[tuple[Any, int]] = [(value, 1)]
    while pending and total <= limit:
        item, depth = pending.pop()
        total += STEP + indent * depth
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, range):
            total += STEP * len(item)
        elif isinstance(item, list | tuple | dict | KeysView | ValuesView | ItemsView):
            if depth > MAX_NESTING:
                raise UnsafeTemplateError(f"it nests lists more than {MAX_NESTING} deep")
            pending.extend((inner, depth + 1) for inner in item)
            if isinstance(item, dict):
                pending.extend((inner, depth + 1) for inner in item.values())
        elif not isinstance(item, _SCALARS):
            raise UnsafeTemplateError(
                f"it shows or compares a {type(item).__name__}, which is not text, a number or a list"
            )
    return total
