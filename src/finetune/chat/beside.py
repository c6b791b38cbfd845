"""What a message has beside its text: its thought, its calls, the tools it knows; given to templates as it is."""

import json
import re
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from itertools import product
from typing import Any

from finetune.errors import TemplateError
from finetune.records import Conversation, Message

_TAG = re.compile(r"</?[A-Za-z_]+>")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""What a thought is called, by this template or that."""
_CALL = {"id": "000000000", "type": "function", "function": {"name": "probe", "arguments": {}}}
PROBE_CALL = Conversation(
    (Message("user", "question"), Message("assistant", "", json.dumps({"content": None, "tool_calls": [_CALL]}))),
    "template probe",
)
"""A call as every template that knows calls takes it: Mistral's want an id of nine letters, Llama's one call alone."""


def join_inputs(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, an alpaca input joined to its instruction."""
    if not any(message.role == "input" for message in messages):
        return tuple(messages)
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
    if not is_rich(talk):
        return
    for part, words in _beside(talk, learned):
        if not all(any(_shows(real, way) for way in ways) for ways in words):
            last = "; where it shows that of the last answer alone, set template.train_on to last" * (len(learned) > 1)
            unread = {"a thought": [f"messages.{each}" for each in _THOUGHTS], "tools": ["tools"]}.get(part)
            left_out = f"leave it unread: --set 'data.ignore_columns=[{', '.join(unread)}]'" if unread else ""
            raise TemplateError(
                f"{talk.where}: template {name!r} does not show {part}",
                hint="choose a template that knows it, such as the model's own, or "
                f"{left_out or 'leave it out of the data'}{last}",
            )


def with_marked_results(talk: Conversation, mark: Callable[[int], str]) -> Conversation:
    """The same with a marker in place of each result that is looked at as a whole."""
    if not is_rich(talk):
        return talk
    messages = list(talk.messages)
    for index, message in enumerate(messages):
        if message.role == "tool" and not message.content and "content" in json.loads(message.more or "{}"):
            messages[index] = replace(message, more=json.dumps({**json.loads(message.more), "content": mark(index)}))
    return replace(talk, messages=tuple(messages))


def require_harmless(
    name: str, talk: Conversation, control: re.Pattern[str], said: re.Pattern[str], read: Set[str]
) -> None:
    """Refuse variables that the template does not read, and control tokens in markup, where they would be meant."""
    if not is_rich(talk):
        return
    unread = sorted(json.loads(talk.variables or "{}").keys() - read)
    if unread:
        columns = ", ".join(sorted({each if each == "documents" else "chat_template_kwargs" for each in unread}))
        raise TemplateError(
            f"{talk.where}: template {name!r} reads no variable {', '.join(map(repr, unread))}",
            hint=f"it reads {', '.join(sorted(read)) or 'none that can be set'}; to leave what rows set unread: "
            f"--set 'data.ignore_columns=[{columns}]'",
        )
    for text in (talk.tools, talk.variables, *(message.more for message in talk.messages)):
        found = next((token for token in control.findall(text) if not said.fullmatch(token)), None)
        if found:
            raise TemplateError(
                f"{talk.where}: template {name!r} would show the control token {found!r} of a call or thought",
                hint="take it out of the data: a server would take it for the end of a turn",
            )


def _beside(talk: Conversation, learned: Sequence[int]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """What learned messages have beside their text, results and tools: each with what the template must show of it."""
    yield "tools", _names(json.loads(talk.tools or "[]"))
    for index in learned:
        more = json.loads(talk.messages[index].more or "{}")
        if isinstance(more.get("content"), str):
            yield "an answer", [(words,) for each in _TAG.split(more["content"]) if (words := each.strip())]
        for part in _THOUGHTS:
            if isinstance(more.get(part), str):
                yield "a thought", [(more[part].strip(),)]
        calls = more.get("tool_calls") or ([more["function_call"]] if "function_call" in more else [])
        yield "tool_calls", _names(calls)
    for message in talk.messages:
        if message.role == "tool" and not message.content and message.more:
            content = str(json.loads(message.more).get("content", ""))
            yield "a result", [(content.strip(), json.dumps(content, ensure_ascii=False)[1:-1])]


def _shows(text: str, words: str) -> bool:
    """Whether a text has these words, and not only as a part of others."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def other_ways(conversation: Conversation) -> Iterator[Conversation]:
    """The conversation in other words for the same: templates differ in how they take what is more than text."""
    tried = {conversation.messages}
    for changes in product((None, _empty), (None, _tagged), (None, _quoted), (None, *_THOUGHTS)):
        messages = conversation.messages
        for change in changes:
            if change:
                messages = tuple(_changed(message, change) for message in messages)
        if messages not in tried:
            tried.add(messages)
            yield replace(conversation, messages=messages)


def _changed(message: Message, change: str | Callable[[str, str, dict[str, Any]], str]) -> Message:
    """A message whose thought is under another name, or whose text is elsewhere."""
    more = json.loads(message.more or "{}")
    content = message.content
    if callable(change):
        content = change(message.role, content, more)
    elif thought := next((more.pop(name) for name in _THOUGHTS if name in more), None):
        more[change] = thought
    return replace(message, content=content, more=json.dumps(more, ensure_ascii=False) if more else "")


def _empty(_: str, content: str, more: dict[str, Any]) -> str:
    """No text as an empty one."""
    if more.get("content", "") is None:
        del more["content"]
    return content


def _tagged(role: str, content: str, more: dict[str, Any]) -> str:
    """An answer that the template takes apart, as some do by `<think>`: it is looked at as a whole."""
    if role == "assistant" and _TAG.search(content):
        more["content"], content = content, ""
    return content


def _quoted(role: str, content: str, more: dict[str, Any]) -> str:
    """A result that the template writes as JSON: it is looked at as a whole."""
    if role == "tool" and content:
        more["content"], content = content, ""
    return content


def _names(functions: object) -> list[tuple[str, ...]]:
    """The names of functions that are called, or can be."""
    listed = functions if isinstance(functions, list) else []
    inner = [each.get("function", each) for each in listed if isinstance(each, dict)]
    return [(each["name"],) for each in inner if isinstance(each, dict) and isinstance(each.get("name"), str)]
