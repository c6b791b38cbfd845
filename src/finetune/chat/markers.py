"""Markers that stand in the place of messages' texts, so that what a template writes around them is seen."""

import re
from collections.abc import Callable, Sequence
from itertools import takewhile

from finetune.records import Conversation, Message

MARKER = re.compile("\ue000([0-9]+)\ue001")
Kinds = tuple[tuple[str, bool], ...]


def is_marked(message: Message) -> bool:
    """Whether a marker can stand for its text: not where it is empty and the template may ask whether it is."""
    sought = message.role == "assistant" or message.trained is not None
    return bool(message.content) or (sought and not message.more)


def kinds(talk: Conversation) -> tuple[tuple[str, bool], ...]:
    """What a skeleton of plain messages depends on: their roles, and which of them are empty."""
    return tuple((message.role, is_marked(message)) for message in talk.messages)


def marker(index: int) -> str:
    """What stands in the place of a message."""
    return f"\ue000{index}\ue001"


def common_ending(tails: Sequence[str], control: re.Pattern[str], *, last: str, beyond: str | None) -> str:
    """What all these texts begin with, up to the token to stop at: `last`, or else the last that stands in front of
    `beyond`. Where it stands several times, a model that stops at it says it once.
    """
    alike = "".join(found[0] for found in takewhile(lambda each: len(set(each)) == 1, zip(*tails, strict=False)))
    tokens = list(takewhile(lambda token: token.group() != beyond, control.finditer(alike)))
    words = [token.group() for token in tokens]
    stops = [token for token in tokens if token.group() == (last if last in words else words[-1])]
    words_first = not stops or alike[: tokens[0].start()].strip()
    return "" if words_first else alike[: stops[0].end()]


_WHOLE_OR_TRIMMED = (
    *(str, str.strip, str.lstrip, str.rstrip),
    *(lambda text: text.strip("\n"), lambda text: text.lstrip("\n"), lambda text: text.rstrip("\n")),
)


def texts_between(
    markup: Sequence[str],
    messages: Sequence[Message],
    real: str,
    ways: Sequence[Callable[[str], str]] = _WHOLE_OR_TRIMMED,
) -> list[str] | None:
    """What `real` shows of each message between the markup: its text, in one of the ways; None for anything else."""
    if not real.startswith(markup[0]):
        return None
    at = len(markup[0])
    texts: list[str] = []
    for message, after in zip(messages, markup[1:], strict=True):
        shown = next((text for way in ways if real.startswith((text := way(message.content)) + after, at)), None)
        if shown is None:
            return None
        texts.append(shown)
        at += len(shown) + len(after)
    return texts if at == len(real) else None
