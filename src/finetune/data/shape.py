"""Recognises the shape of each row (alpaca, chat messages, prompt/completion, text) and brings it into one form."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

from finetune.data.read import raise_all
from finetune.errors import DataError
from finetune.records import Conversation, Document, Message, Row

_HINT = "rows are alpaca (instruction, output), chat (messages), prompt/completion, or text"
ROLES = ("system", "developer", "user", "assistant", "tool")
Example = Conversation | Document


@dataclass(frozen=True, slots=True)
class ShapedRows:
    """The rows in one form, with counts of dropped rows and the columns that were ignored."""

    examples: tuple[Example, ...]
    shapes: dict[str, int]
    dropped: dict[str, int]
    ignored_columns: tuple[str, ...]


def shape_rows(rows: Sequence[Row]) -> ShapedRows:
    """Turn rows into conversations and documents; a row whose answer is empty or that weighs 0 is dropped and counted.

    Raises:
        DataError: a row has no known shape, a missing or mistyped field, an unknown role, or a weight between 0 and 1;
            all such rows are named.
    """
    examples: list[Example] = []
    shapes: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    ignored: set[str] = set()
    problems: dict[str, str] = {}
    for row in rows:
        try:
            name = shape_of(row)
            example = _PARSERS[name](row)
            if isinstance(example, Conversation):
                example = replace(example, tools=tools_of(row), variables=_variables(row))
            learned = _learned(row, _ROW_MARKS)
        except DataError as error:
            problems[error.message] = error.hint or _HINT
            continue
        shapes[name] += 1
        ignored |= _ignored(row, name)
        reason = "weight 0" if learned is False else _unfit(example)
        if reason:
            dropped[reason] += 1
        else:
            examples.append(example)
    raise_all([*problems], hint="; ".join(dict.fromkeys(problems.values())))
    return ShapedRows(tuple(examples), dict(shapes), dict(dropped), tuple(sorted(map(_shown, ignored))))


def shape_of(row: Row) -> str:
    """Which of the four shapes a row has, by its columns.

    Raises:
        DataError: no shape fits, or more than one does.
    """
    keys = set(row.values)
    fitting = [name for name, marks in _MARKS.items() if marks <= keys]
    if len(fitting) == 1:
        return fitting[0]
    columns = ", ".join(sorted(map(_shown, keys))) or "none"
    if fitting:
        raise DataError(f"{row.where}: columns ({columns}) fit several shapes: {', '.join(fitting)}")
    missing = {name: marks - keys for name, marks in _MARKS.items() if marks & keys}
    if missing:
        name, lacks = next(iter(missing.items()))
        raise DataError(f"{row.where}: {name} row without {' and '.join(sorted(lacks))!r} (columns: {columns})")
    raise DataError(f"{row.where}: no known shape (columns: {columns})")


def _ignored(row: Row, shape: str) -> set[str]:
    """The parts of a row that are ignored: columns, and keys of a message besides role and content."""
    within = {
        f"{column}.{key}"
        for column, turns in row.values.items()
        if column in _COLUMNS[shape] and isinstance(turns, list)
        for turn in turns
        for key, value in turn.items()
        # A Parquet file gives every message every key that any of them has.
        if key not in ("role", "content", *_MEANT, *_MARKS_OF_MESSAGES) and value is not None
    }
    beside = {*_ROW_MARKS, *(() if shape == "text" else _BESIDE)}
    return within | (set(row.values) - _COLUMNS[shape] - beside)


def _shown(column: str) -> str:
    """A column's name as any terminal and file can show it: half a surrogate pair is spelled out."""
    return column.encode("utf-8", "backslashreplace").decode("utf-8")


def _unfit(example: Example) -> str:
    """Why a row teaches nothing, or two things at once; "" where it does neither."""
    if isinstance(example, Document):
        return "" if example.text.strip() else "empty text"
    if not example.messages or example.messages[-1].role != "assistant":
        return "no answer at the end"
    more = [json.loads(message.more or "{}") for message in example.messages]
    thinks = (_THOUGHTS & each.keys() for each in more)
    if any(beside and "<think>" in each.content for beside, each in zip(thinks, example.messages, strict=True)):
        return "a thought in <think> and one beside it"
    return "" if example.messages[-1].content.strip() or _SAID & more[-1].keys() else "empty answer"


def _text_field(row: Row, key: str) -> str:
    value = row.values.get(key)
    if value is None:
        return ""
    if key == "content" and isinstance(value, list):
        value = "\n".join(_part(part, row.where) for part in value)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {key!r} must be text, found {type(value).__name__} {str(value)[:60]!r}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{row.where}: {key!r} holds half of a surrogate pair, which is not text") from None
    return value


def _part(part: Any, where: str) -> str:
    """The text of a part of a message's content; servers join them by line breaks."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise DataError(f"{where}: 'content' has a part of type {kind!r}: only parts of type 'text' can be trained")
    return str(part["text"])


def _parse_alpaca(row: Row) -> Conversation:
    messages = [Message("user", _text_field(row, "instruction"))]
    if system := _text_field(row, "system"):
        messages.insert(0, Message("system", system))
    if extra := _text_field(row, "input"):
        messages.append(Message("input", extra))
    messages.append(Message("assistant", _text_field(row, "output")))
    return Conversation(tuple(messages), row.where)


def _parse_chat(row: Row) -> Conversation:
    return Conversation(messages_of(row, "messages"), row.where)


def _parse_prompt_completion(row: Row) -> Conversation:
    if isinstance(row.values["prompt"], list) or isinstance(row.values["completion"], list):
        return Conversation(messages_of(row, "prompt") + messages_of(row, "completion"), row.where)
    turns = (Message("user", _text_field(row, "prompt")), Message("assistant", _text_field(row, "completion")))
    return Conversation(turns, row.where, from_text=True)


def _parse_text(row: Row) -> Document:
    return Document(_text_field(row, "text"), row.where)


def messages_of(row: Row, key: str) -> tuple[Message, ...]:
    """The messages in a column.

    Raises:
        DataError: it holds something else.
    """
    turns = row.values[key]
    if not isinstance(turns, list):
        raise DataError(f"{row.where}: {key!r} must be a list of messages, found {type(turns).__name__}")
    return tuple(_message(Row(turn, f"{row.where} {key}[{index}]")) for index, turn in enumerate(turns))


def _message(turn: Row) -> Message:
    values: Any = turn.values
    if not isinstance(values, dict):
        raise DataError(f"{turn.where}: expected a message object, found {type(values).__name__}")
    role = values.get("role")
    if role not in ROLES:
        raise DataError(f"{turn.where}: unknown role {role!r}, expected one of {', '.join(ROLES)}")
    more = {key: values[key] for key in _MEANT if values.get(key) not in _NOTHING}
    if more and values.get("content") is None:
        more["content"] = None  # templates ask whether it is none
    learned = _learned(turn, _MARKS_OF_MESSAGES)
    if learned and role != "assistant" and not any(_mark(turn, key) for key in ("train", "training")):
        learned = None  # a weight of 1 is every answer's, and asks for nothing more of other messages
    return Message(role, _text_field(turn, "content"), _as_json(more, turn.where), learned)


def _learned(of: Row, keys: Sequence[str]) -> bool | None:
    """Whether a row or a message says that it is learned, or that it is not; None where it says neither."""
    said = {key: mark for key in keys if (mark := _mark(of, key)) is not None}
    if len(set(said.values())) > 1:
        which = " and ".join(f"{key} {of.values[key]!r}" for key in said)
        raise DataError(f"{of.where}: {which} contradict each other", hint="keep one of them")
    return next(iter(said.values()), None)


def _mark(of: Row, key: str) -> bool | None:
    """What a weight or a mark for training says: 1 or true, 0 or false, or nothing."""
    value = of.values.get(key)
    if value is None or value == "":
        return None
    word = str(value).strip().lower()
    if word not in _YES_OR_NO:
        raise DataError(
            f"{of.where}: {key!r} is {str(value)[:60]!r}; it says whether to learn: 1 or true, 0 or false",
            hint="every learned token counts alike: repeat a row that is to count more, leave out one that is to count "
            "less, and rename a key that means something else",
        )
    return _YES_OR_NO[word]


def tools_of(row: Row) -> str:
    """The tools that a row's templates are told of, as a JSON list; "" for none.

    Raises:
        DataError: it holds something else.
    """
    tools = row.values.get("tools")
    if isinstance(tools, str):  # many files keep them as text
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{row.where}: 'tools' is text that is no JSON: {error}") from None
    if not isinstance(tools, list | NoneType):
        raise DataError(f"{row.where}: 'tools' must be a list, found {type(tools).__name__}")
    return _as_json(tools, row.where)


def _variables(row: Row) -> str:
    """What a row sets for its template besides: `chat_template_kwargs`, and `documents`; as JSON."""
    own, documents = row.values.get("chat_template_kwargs") or {}, row.values.get("documents")
    if not isinstance(own, dict) or any(name in ("messages", "tools", "add_generation_prompt") for name in own):
        raise DataError(f"{row.where}: 'chat_template_kwargs' must set variables by name, found {str(own)[:60]!r}")
    # A Parquet file gives every row every name that any of them has.
    given = {name: value for name, value in own.items() if value is not None}
    return _as_json(given | ({"documents": documents} if documents else {}), row.where)


def _as_json(value: Any, where: str) -> str:
    """As one line of JSON; "" for nothing."""
    if value in _NOTHING:
        return ""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: {str(value)[:60]!r} cannot be written as JSON: {error}") from None
    return text


_MEANT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "name", "tool_call_id")
"""Parts of a message besides its text that a template is given, as transformers gives them."""
_MARKS_OF_MESSAGES = ("weight", "train", "training")
_ROW_MARKS = ("weight", "train")
_YES_OR_NO = {"0": False, "0.0": False, "-0.0": False, "false": False, "1": True, "1.0": True, "true": True}
_BESIDE = ("tools", "documents", "chat_template_kwargs")
_THOUGHTS = {"reasoning_content", "reasoning", "thinking"}
_SAID = {"tool_calls", "function_call", *_THOUGHTS}
_NOTHING: tuple[Any, ...] = (None, "", [], {})
_MARKS: dict[str, set[str]] = {
    "alpaca": {"instruction", "output"},
    "chat": {"messages"},
    "prompt/completion": {"prompt", "completion"},
    "text": {"text"},
}
_COLUMNS: dict[str, set[str]] = {**_MARKS, "alpaca": {"instruction", "output", "input", "system"}}
_PARSERS: dict[str, Callable[[Row], Example]] = {
    "alpaca": _parse_alpaca,
    "chat": _parse_chat,
    "prompt/completion": _parse_prompt_completion,
    "text": _parse_text,
}
