"""Texts, conversations, and data rows with what a reader must make of them."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from hypothesis import strategies as st

from finetune.records import Conversation, Document, Message
from finetune_strategies.picks import EITHER, between, order_of

Example = Conversation | Document

LOOKS_LIKE_CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<|im_start|>system\n", "<|eot_id|>"),
    *("<|start_header_id|>assistant<|end_header_id|>", "<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>"),
    *("<|pad|>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "### Response:\n", "### Instruction:"),
)
"""Texts that are control tokens or markup of some format; in somebody's text they are only characters."""

_AWKWARD = (
    *("{}", "{0}", "{{ }}", "{{ bos_token }}", "{% raw %}", "{% if x %}", "{#", "%s", "$x", "{instruction}"),
    *('"""', "'''", "\r\n", "\n", "\n\n\n", "  ", "\t", " \n", "\u00a0", "\u2028", "\x85", "\x1f", "\0"),
    *("\ue0000\ue001", "\ue0001\ue001", "\ue000", "\ue001", "\ufeff", "\u202e", "e\u0301", "é", "Москва", "資料庫"),
    *("🦙", "👩‍🔬", "\U00020000", "\U0010fffd", "a", "Hello world", "42", "'s", "...", ":", "\\n"),
)
_EVERY_PLANE = st.characters(exclude_categories=["Cs"])


@cache
def texts(min_size: int = 0) -> st.SearchStrategy[str]:
    """Any text without lone surrogates, often with markup, braces, line ends or marker characters in it."""
    piece = st.sampled_from(LOOKS_LIKE_CONTROL) | st.sampled_from(_AWKWARD) | st.text(_EVERY_PLANE, max_size=6)
    return st.lists(piece, max_size=5).map("".join).filter(lambda text: len(text) >= min_size)


@cache
def said() -> st.SearchStrategy[str]:
    """Text that says something: not only white space."""
    return texts(min_size=1).filter(lambda text: bool(text.strip()))


@st.composite
def conversations(
    draw: st.DrawFn, *, max_turns: int = 3, inputs: bool = True, contents: st.SearchStrategy[str] | None = None
) -> Conversation:
    """Turns of user and assistant that end with an answer, with or without system text and alpaca inputs."""
    words = texts() if contents is None else contents
    messages = [Message("system", draw(words))] if draw(EITHER) else []
    for _ in range(draw(between(1, max_turns))):
        messages.append(Message("user", draw(words)))
        if inputs and draw(EITHER):
            messages.append(Message("input", draw(words)))
        messages.append(Message("assistant", draw(words)))
    return Conversation(tuple(messages), "rows.jsonl:1")


@dataclass(frozen=True)
class RowCase:
    """A row's columns and what a reader must make of them; `dropped` is the reason, or "" when the row is kept."""

    values: dict[str, Any]
    shape: str
    example: Example
    dropped: str = ""
    ignored: tuple[str, ...] = ()


_OUTPUTS = texts() | said()
_EXTRAS = st.sampled_from([None, ""]) | texts(min_size=1) | said()
_CHATS = conversations(inputs=False)


def _as_messages(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def _spoken(pairs: list[tuple[str, str]]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in pairs), "")


@st.composite
def _alpaca(draw: st.DrawFn) -> tuple[dict[str, Any], Example]:
    values: dict[str, Any] = {"instruction": draw(texts()), "output": draw(_OUTPUTS)}
    for key in ("input", "system"):
        if draw(between(0, 3)):
            values[key] = draw(_EXTRAS)
    said = {key: value for key, value in values.items() if (value or "").strip()}
    pairs = [("system", values["system"])] if "system" in said else []
    # What is empty adds nothing: an input without an instruction is the question.
    asked = [(role, values[key]) for role, key in (("user", "instruction"), ("input", "input")) if key in said]
    pairs += [("user", asked[0][1]), *asked[1:]] if asked else [("user", values["instruction"])]
    return values, _spoken([*pairs, ("assistant", values["output"])])


@st.composite
def _chat(draw: st.DrawFn) -> tuple[dict[str, Any], Example]:
    pairs = [(m.role, m.content) for m in draw(_CHATS).messages]
    if draw(EITHER):
        pairs = pairs[:-1]
    turns = [{**turn, **draw(_MARKS)} for turn in _as_messages(pairs)]
    return {"messages": turns}, _spoken(pairs)


@st.composite
def _prompt_completion(draw: st.DrawFn) -> tuple[dict[str, Any], Example]:
    if draw(EITHER):
        prompt, completion = draw(texts()), draw(texts())
        return {"prompt": prompt, "completion": completion}, _spoken([("user", prompt), ("assistant", completion)])
    pairs = [(m.role, m.content) for m in draw(_CHATS).messages]
    return {"prompt": _as_messages(pairs[:-1]), "completion": _as_messages(pairs[-1:])}, _spoken(pairs)


_DOCUMENTS = texts().map(lambda text: ({"text": text}, Document(text, "")))
_SHAPES = {"alpaca": _alpaca(), "chat": _chat(), "prompt/completion": _prompt_completion(), "text": _DOCUMENTS}
_SHAPE_NAMES = st.sampled_from(sorted(_SHAPES))
_SAYS: list[dict[str, Any]] = [{"weight": 0}, {"weight": 1}, {"weight": None}, {"train": False}, {"train": True}]
_MARKS = st.sampled_from([{}, *_SAYS])
"""What a row or a message says of whether it is learned; it changes no word."""
_IGNORED = st.lists(st.sampled_from(["id", "kind", "größe", "", "score"]), max_size=2, unique=True)
_UNREAD = st.none() | st.integers() | texts()


@st.composite
def rows(draw: st.DrawFn) -> RowCase:
    """A row of any shape, with columns nobody reads, and what it must become."""
    shape = draw(_SHAPE_NAMES)
    values, example = draw(_SHAPES[shape])
    ignored = draw(_IGNORED)
    weight = draw(_MARKS) if draw(EITHER) else {}
    values = {**values, **weight, **{name: draw(_UNREAD) for name in ignored}}
    if 0 in weight.values():
        dropped = "weight 0"
    elif isinstance(example, Document):
        dropped = "" if example.text.strip() else "empty text"
    elif not example.messages or example.messages[-1].role != "assistant":
        dropped = "no answer at the end"
    else:
        dropped = "" if example.answer.strip() else "empty answer"
    names = draw(order_of(*sorted(values)))
    return RowCase({name: values[name] for name in names}, shape, example, dropped, tuple(sorted(ignored)))
