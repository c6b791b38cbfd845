"""Reads the messages of a row, in every spelling that public files have, and what stands beside them."""

import json
from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Any

from finetune.data.cells import NOTHING, ROLE_KEYS, is_open, turns_of_script
from finetune.data.names import ANSWERS, QUESTIONS, ROW_MARKS, THOUGHTS, normal
from finetune.errors import DataError
from finetune.records import Message, Row

ROLES = ("system", "developer", "user", "assistant", "tool")

_MARKS = (*ROW_MARKS, "training", "loss")
_MEANT = ("tool_calls", "function_call", *THOUGHTS, "name", "tool_call_id")
"""Parts of a message besides its text that a template is given, as transformers gives them."""
_CONTENT_KEYS = ("content", "value", "text", "parts")
_CALL = "call"
_SPELLINGS = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "bing", "bard", "claude"), "assistant"),
    **dict.fromkeys(("function", "function_response", "observation", "ipython"), "tool"),
    **dict.fromkeys(("tool_response", "tool_result", "tool_results"), "tool"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), _CALL),
}
_REFUSED = ("label", "loss_mask", "mask", "train_detail")
_MEDIA = ("image", "images", "image_url", "audio", "audios", "video", "videos")
_PLAIN_KEYS, _ODD_KEYS = {"role", "content", *_MEANT, *_MARKS}, {*_REFUSED, *_MEDIA}
_YES_OR_NO = {"0": False, "0.0": False, "-0.0": False, "false": False, "1": True, "1.0": True, "true": True}
_TURNS_ARE = 'write each turn as {"role": ..., "content": ...}'


class RowError(DataError):
    """What is wrong with one row.

    Args:
        where: the row, or the message in it.
        what: the fault, with the value.
        kind: the fault in the same words for every row that has it; `what` where nothing of it differs.
        refuses: whether it is a fault of how the rows are made, for which the file is refused; any other costs the row.
    """

    def __init__(self, where: str, what: str, *, kind: str = "", hint: str = "", refuses: bool = False) -> None:
        super().__init__(f"{where}: {what}", hint=hint)
        self.where, self.what, self.kind, self.refuses = where, what, kind or what, refuses


def text_of(value: object, key: str, where: str) -> str:
    """The text of a column or of a message; null is none."""
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        what = f"{key!r} must be text, found {kind} {str(value)[:60]!r}"
        raise RowError(where, what, kind=f"{key!r} holds no text, but {kind}", hint=f"write {key!r} as text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(where, f"{key!r} holds half of a surrogate pair, which is not text") from None
    return value


def said_in(value: object, key: str, where: str) -> str:
    """The text of a column that may be kept as the parts of a message, or in an object that has nothing else to say."""
    if isinstance(value, dict):
        value = value.get(_said_in(value, _CONTENT_KEYS) or "", value)
    if isinstance(value, list):
        value = "\n".join(_part(part, where) for part in value)
    return text_of(value, key, where)


def side_of(row: Row, key: str, role: str) -> tuple[Message, ...]:
    """What one side says: a text, or messages; of several answers the first."""
    value = row.values.get(key)
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        if len(value) < 2 or role == "assistant":
            return (Message(role, text_of(value[0] if value else "", key, row.where)),)
        what = f"{key!r} holds {len(value)} texts: what is asked must be one, or a list of messages"
        raise RowError(row.where, what, kind=f"{key!r} holds several texts", hint=_TURNS_ARE)
    if isinstance(value, dict) and not _said_in(value, ROLE_KEYS) and _said_in(value, _CONTENT_KEYS):
        return (Message(role, said_in(value, key, row.where)),)
    if isinstance(value, list | dict):
        return messages_of(row, key)
    if role == "user" and is_open(turns_of_script(value) if isinstance(value, str) else []):
        return script_of(row, key)[:-1]
    return (Message(role, text_of(value, key, row.where)),)


def script_of(row: Row, key: str) -> tuple[Message, ...]:
    """The turns of a text that says before each who speaks; none of anything else."""
    value = row.values.get(key)
    turns = turns_of_script(value) if isinstance(value, str) else []
    return tuple(Message(each["role"], text_of(each["content"], key, row.where)) for each in turns)


def messages_of(row: Row, key: str) -> tuple[Message, ...]:
    """The messages in a column: a list of them, the JSON of one, a list for each of their keys, or one alone.

    Raises:
        DataError: it holds something else.
    """
    return tuple(
        message
        for index, turn in enumerate(_turns(row, key))
        for message in _turn(Row(turn, f"{row.where} {key}[{index}]"))
    )


def _turns(row: Row, key: str) -> list[Any]:
    """The turns in a column; texts alone are a user's and the assistant's in turn."""
    value = row.values[key]
    script = turns_of_script(value) if isinstance(value, str) else []
    turns = script or _parsed(value, key, row.where)
    if isinstance(turns, dict):
        columns = list(turns.values())
        long = all(isinstance(each, list) and len(each) == len(columns[0]) for each in columns)
        # Hugging Face's datasets keep a list of objects as an object of lists.
        turns = [dict(zip(turns, each, strict=True)) for each in zip(*columns, strict=True)] if long else [turns]
    if not isinstance(turns, list):
        what = f"{key!r} must be a list of messages, found {type(turns).__name__}"
        raise RowError(row.where, what, hint=_TURNS_ARE)
    if len(turns) > 1 and all(isinstance(turn, str) for turn in turns):
        return [{"role": ("user", "assistant")[at % 2], "content": said} for at, said in enumerate(turns)]
    return turns


def history_of(row: Row, key: str) -> tuple[Message, ...]:
    """Earlier turns: a list of pairs of a question and its answer, or of messages."""
    turns = _parsed(row.values.get(key) or [], key, row.where)
    found: list[Message] = []
    for index, turn in enumerate(turns if isinstance(turns, list) else [turns]):
        where = f"{row.where} {key}[{index}]"
        if isinstance(turn, list) and len(turn) == 2:
            pair = zip(("user", "assistant"), turn, strict=True)
            found += [Message(role, text_of(said, "history", where)) for role, said in pair]
        elif isinstance(turn, dict):
            found += _turn(Row(turn, where))
        else:
            what = f"a turn must be a question and its answer, found {str(turn)[:60]!r}"
            raise RowError(where, what, kind=f"{key!r} holds what is no question with its answer")
    return tuple(found)


def keys_beside(row: Row, key: str) -> set[str]:
    """The keys of a column's messages that nothing reads, as `messages.mood`; null is nothing."""
    return {
        f"{key}.{name}"
        for turn in _turns(row, key)
        if isinstance(turn, dict)  # one text alone is read as it is
        for name in turn.keys() - _PLAIN_KEYS
        if turn[name] is not None and not _is_read(turn, name)
    }


def _is_read(turn: dict[str, Any], name: str) -> bool:
    said = [_said_in(turn, keys) for keys in (ROLE_KEYS, _CONTENT_KEYS)]
    return name in said or (said[0] is None and normal(name) in (*QUESTIONS, *ANSWERS, "system"))


def _said_in(turn: dict[str, Any], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if turn.get(key) is not None), None)


def _turn(turn: Row) -> Iterator[Message]:
    """The message that a turn is, or the messages where one object holds a question and its answer."""
    values: Any = turn.values
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise RowError(turn.where, f"expected a message object, found {kind}", hint=_TURNS_ARE)
    for name in sorted(values.keys() & _ODD_KEYS):
        if values[name] in NOTHING:
            continue
        if name in _MEDIA:
            raise RowError(turn.where, f"{name!r} is no text: only text can be trained")
        what = f"{name!r} of a message says what is to be learned, and is not read"
        hint = 'a message that is not to be learned has "train": false'
        raise RowError(turn.where, what, hint=hint, refuses=True)
    key = _said_in(values, ROLE_KEYS)
    if key is not None:
        yield _message(turn, values[key])
        return
    pair = {normal(name): name for name, value in values.items() if value is not None}
    asked, answered = ([pair[name] for name in names if name in pair] for names in (QUESTIONS, ANSWERS))
    if len(asked) == len(answered) == 1:
        learned = _learned(turn)
        parts = (("system", pair.get("system", "")), ("user", asked[0]), ("assistant", answered[0]))
        for role, name in parts:
            said = text_of(values.get(name), name, turn.where)
            if said or role == "assistant":
                yield Message(role, said, trained=learned if role == "assistant" else None)
        return
    yield _message(turn, None)


def _message(turn: Row, said_by: object) -> Message:
    values: Any = turn.values
    role = _SPELLINGS.get(said_by.strip().lower()) if isinstance(said_by, str) else None
    if role is None:
        what = f"unknown role {str(said_by)[:60]!r}" if said_by is not None else "unknown role None"
        raise RowError(turn.where, f"{what}, expected one of {', '.join(ROLES)}", kind=what)
    key = _said_in(values, _CONTENT_KEYS) or "content"
    contents = [values[name] for name in _CONTENT_KEYS if name in values and values[name] not in NOTHING]
    if any(content != contents[0] for content in contents):
        raise RowError(turn.where, f"{' and '.join(_CONTENT_KEYS[:2])} of a message differ: which is its text?")
    more = {name: values[name] for name in _MEANT if name in values and values[name] not in NOTHING}
    content: object = values.get(key)
    if role == _CALL:
        more, content, role = {**more, "tool_calls": calls_of(content, turn.where)}, None, "assistant"
    if more and content is None:
        more["content"] = None  # templates ask whether it is none
    learned = _learned(turn)
    if learned and role != "assistant" and not any(mark_of(turn, mark) for mark in _MARKS[1:]):
        learned = None  # a weight of 1 is every answer's, and asks for nothing more of other messages
    if isinstance(content, list):
        content = "\n".join(_part(part, turn.where) for part in content)
    return Message(role, text_of(content, key, turn.where), as_json(more, turn.where), learned)


def _part(part: Any, where: str) -> str:
    """The text of a part of a message's content; servers join them by line breaks."""
    if isinstance(part, str):
        return part
    kind = (
        part.get("type", "text" if part.keys() == {"text"} else None) if isinstance(part, dict) else type(part).__name__
    )
    if kind != "text" or not isinstance(part.get("text"), str):
        raise RowError(where, f"'content' has a part of type {kind!r}: only parts of type 'text' can be trained")
    return str(part["text"])


def calls_of(said: object, where: str) -> list[dict[str, Any]]:
    """The calls that a turn of ShareGPT's `function_call` is: an object of name and arguments, or a list of them."""
    found = _parsed(said, "function_call", where)
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            what = f"a call must be an object with a name, found {str(call)[:60]!r}"
            raise RowError(where, what, kind="a call that is no object with a name")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def _parsed(value: Any, key: str, where: str) -> Any:
    """A value that may be kept as the text of its JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        what = f"{key!r} is text that is no JSON: {error}"
        raise RowError(where, what, kind=f"{key!r} is text that is no JSON", hint="write it with json.dumps") from None


def _learned(turn: Row) -> bool | None:
    return learned_of(turn, _MARKS)


def learned_of(of: Row, keys: Sequence[str]) -> bool | None:
    """Whether a row or a message says that it is learned, or that it is not; None where it says neither."""
    said = {key: mark for key in keys if key in of.values and (mark := mark_of(of, key)) is not None}
    if len(set(said.values())) > 1:
        which = " and ".join(f"{key} {of.values[key]!r}" for key in said)
        raise RowError(of.where, f"{which} contradict each other", hint="keep one of them", refuses=True)
    return next(iter(said.values()), None)


def mark_of(of: Row, key: str) -> bool | None:
    """What a weight or a mark for training says: 1 or true, 0 or false, or nothing."""
    value = of.values.get(key)
    if value is None or value == "":
        return None
    word = str(value).strip().lower()
    if word not in _YES_OR_NO:
        raise RowError(
            of.where,
            f"{key!r} is {str(value)[:60]!r}; it says whether to learn: 1 or true, 0 or false",
            hint="every learned token counts alike: repeat a row that is to count more, leave out one that is to count "
            "less, and leave a key that means something else unread (data.ignore_columns)",
            refuses=True,
        )
    return _YES_OR_NO[word]


def tools_of(row: Row, key: str = "tools") -> str:
    """The tools that a row's templates are told of, as a JSON list; "" for none.

    Raises:
        DataError: it holds something else.
    """
    tools = row.values.get(key)
    if isinstance(tools, str):  # many files keep them as text
        tools = _parsed(tools, key, row.where) if tools.strip() else None
    if not isinstance(tools, list | NoneType):
        raise RowError(row.where, f"{key!r} must be a list, found {type(tools).__name__}")
    return as_json(tools, row.where)


def variables_of(row: Row) -> str:
    """What a row sets for its template besides: `chat_template_kwargs`, and `documents`; as JSON."""
    own, documents = row.values.get("chat_template_kwargs") or {}, row.values.get("documents")
    if not isinstance(own, dict) or any(name in ("messages", "tools", "add_generation_prompt") for name in own):
        raise RowError(row.where, f"'chat_template_kwargs' must set variables by name, found {str(own)[:60]!r}")
    if not own and not documents:
        return ""
    # A Parquet file gives every row every name that any of them has.
    given = {name: value for name, value in own.items() if value is not None}
    return as_json(given | ({"documents": documents} if documents else {}), row.where)


def as_json(value: Any, where: str) -> str:
    """As one line of JSON; "" for nothing."""
    if value in NOTHING:
        return ""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(where, f"{str(value)[:60]!r} cannot be written as JSON: {error}") from None
    return text
