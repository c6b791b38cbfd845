"""What a message has beside its text: its thought, its calls, the tools it knows; given to templates as it is."""

import json
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from typing import Any

from finetune.errors import TemplateError
from finetune.records import Conversation, Message

_TAG = re.compile(r"</?[A-Za-z_]+>")
_CALL = {"id": "000000000", "type": "function", "function": {"name": "probe", "arguments": {}}}
PROBE_CALL = Conversation(
    (Message("user", "question"), Message("assistant", "", json.dumps({"content": None, "tool_calls": [_CALL]}))),
    "template probe",
)
"""A call as every template that knows calls takes it: Mistral's want an id of nine letters, Llama's one call alone."""


def join_inputs(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, an alpaca input joined to its instruction."""
    joined: list[Message] = []
    for message in messages:
        if message.role == "input":
            joined[-1] = replace(joined[-1], content=f"{joined[-1].content}\n\n{message.content}")
        else:
            joined.append(message)
    return tuple(joined)


def is_rich(talk: Conversation) -> bool:
    """Whether there is more than text, so that what stands around the texts does not depend on the roles alone."""
    return bool(talk.tools or talk.variables) or any(message.more for message in talk.messages)


def what_is_given(talk: Conversation, *, as_parts: bool) -> dict[str, Any]:
    """The variables that a conversation sets for its template, as transformers gives them."""
    turns: list[dict[str, Any]] = [{"role": each.role, "content": each.content} for each in talk.messages]
    for turn, message in zip(turns, talk.messages, strict=True):
        if as_parts:
            turn["content"] = [{"type": "text", "text": message.content}]
        if message.more:
            turn |= json.loads(message.more)
    # transformers gives every template these two, so templates ask whether they are none, not whether defined.
    given = {"messages": turns, "tools": json.loads(talk.tools) if talk.tools else None, "documents": None}
    return given | (json.loads(talk.variables) if talk.variables else {})


def require_shown(name: str, talk: Conversation, real: str, learned: Sequence[int]) -> None:
    """Refuse a template that loses what learned messages have beside their text, or the tools."""
    for part, words in _beside(talk, learned):
        if not all(_shows(real, word) for word in words):
            raise TemplateError(
                f"{talk.where}: template {name!r} does not show {part}",
                hint="choose a template that knows it, such as the model's own, or leave it out of the data",
            )


def require_harmless(
    name: str, talk: Conversation, control: re.Pattern[str], said: re.Pattern[str], read: Set[str]
) -> None:
    """Refuse variables that the template does not read, and control tokens in markup, where they would be meant."""
    if not is_rich(talk):
        return
    unread = sorted(json.loads(talk.variables or "{}").keys() - read)
    if unread:
        raise TemplateError(
            f"{talk.where}: template {name!r} reads no variable {', '.join(map(repr, unread))}",
            hint=f"it reads {', '.join(sorted(read)) or 'none that can be set'}",
        )
    for text in (talk.tools, talk.variables, *(message.more for message in talk.messages)):
        found = next((token for token in control.findall(text) if not said.fullmatch(token)), None)
        if found:
            raise TemplateError(
                f"{talk.where}: template {name!r} would show the control token {found!r} of a call or thought",
                hint="take it out of the data: a server would take it for the end of a turn",
            )


def _beside(talk: Conversation, learned: Sequence[int]) -> Iterator[tuple[str, list[str]]]:
    """What learned messages have beside their text, and tools: each with words that the template must show."""
    for index in learned:
        more = json.loads(talk.messages[index].more or "{}")
        if isinstance(more.get("content"), str):
            yield "an answer", [words for each in _TAG.split(more["content"]) if (words := each.strip())]
        for part in ("reasoning_content", "reasoning", "thinking"):
            if isinstance(more.get(part), str):
                yield part, [more[part].strip()]
        calls = more.get("tool_calls") or ([more["function_call"]] if "function_call" in more else [])
        yield "tool_calls", _names(calls)
    yield "tools", _names(json.loads(talk.tools or "[]"))


def _shows(text: str, words: str) -> bool:
    """Whether a text has these words, and not only as a part of others."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def other_ways(conversation: Conversation) -> Iterator[Conversation]:
    """The conversation in other words for the same: no text as an empty one, tagged answers as wholes."""
    for whole in (False, True):
        messages = []
        for message in conversation.messages:
            more = json.loads(message.more or "{}")
            if more.get("content", "") is None:
                del more["content"]
            content = message.content
            if whole and message.role == "assistant" and _TAG.search(content):
                more["content"], content = content, ""
            text = json.dumps(more, ensure_ascii=False) if more else ""
            messages.append(replace(message, content=content, more=text))
        if tuple(messages) != conversation.messages:
            yield replace(conversation, messages=tuple(messages))


def _names(functions: object) -> list[str]:
    """The names of functions that are called, or can be."""
    listed = functions if isinstance(functions, list) else []
    inner = [each.get("function", each) for each in listed if isinstance(each, dict)]
    return [each["name"] for each in inner if isinstance(each, dict) and isinstance(each.get("name"), str)]
