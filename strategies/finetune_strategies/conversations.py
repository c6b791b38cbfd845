"""Texts, conversations, data rows with what a reader must make of them, and damaged data files."""

import json
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from finetune.records import Conversation, Document, Message

Example = Conversation | Document

LOOKS_LIKE_CONTROL = (
    "<|im_start|>", "<|im_end|>", "<|im_start|>system\n", "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>",
    "<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>", "<|pad|>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>",
    "<s>", "</s>", "### Response:\n", "### Instruction:",
)  # fmt: skip
"""Texts that are control tokens or markup of some format; in somebody's text they are only characters."""

_AWKWARD = (
    "{}", "{0}", "{{ }}", "{{ bos_token }}", "{% raw %}", "{% if x %}", "{#", "%s", "$x", "{instruction}", '"""', "'''",
    "\r\n", "\n", "\n\n\n", "  ", "\t", " \n", "\u00a0", "\u2028", "\x85", "\x1f", "\0", "\ue0000\ue001",
    "\ue0001\ue001", "\ue000", "\ue001", "\ufeff", "\u202e", "e\u0301", "é", "Москва", "資料庫", "🦙", "👩‍🔬",
    "\U00020000", "\U0010fffd", "a", "Hello world", "42", "'s", "...", ":", "\\n",
)  # fmt: skip
_EVERY_PLANE = st.characters(exclude_categories=["Cs"])


def texts(min_size: int = 0) -> st.SearchStrategy[str]:
    """Any text without lone surrogates, often with markup, braces, line ends or marker characters in it."""
    piece = st.sampled_from(LOOKS_LIKE_CONTROL) | st.sampled_from(_AWKWARD) | st.text(_EVERY_PLANE, max_size=6)
    return st.lists(piece, max_size=5).map("".join).filter(lambda text: len(text) >= min_size)


def said() -> st.SearchStrategy[str]:
    """Text that says something: not only white space."""
    return texts(min_size=1).filter(lambda text: bool(text.strip()))


@st.composite
def conversations(
    draw: st.DrawFn, *, max_turns: int = 3, inputs: bool = True, contents: st.SearchStrategy[str] | None = None
) -> Conversation:
    """Turns of user and assistant that end with an answer, with or without system text and alpaca inputs."""
    words = texts() if contents is None else contents
    messages = [Message("system", draw(words))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, max_turns))):
        messages.append(Message("user", draw(words)))
        if inputs and draw(st.booleans()):
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


def _told(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def _spoken(pairs: list[tuple[str, str]]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in pairs), "")


@st.composite
def _alpaca(draw: st.DrawFn) -> tuple[dict[str, Any], Example]:
    values: dict[str, Any] = {"instruction": draw(texts()), "output": draw(texts() | said())}
    for key in ("input", "system"):
        if draw(st.integers(0, 3)):
            values[key] = draw(st.sampled_from([None, ""]) | texts(min_size=1) | said())
    pairs = [("system", values["system"])] if values.get("system") else []
    pairs.append(("user", values["instruction"]))
    pairs += [("input", values["input"])] if values.get("input") else []
    return values, _spoken([*pairs, ("assistant", values["output"])])


@st.composite
def _chat(draw: st.DrawFn) -> tuple[dict[str, Any], Example]:
    pairs = [(m.role, m.content) for m in draw(conversations(inputs=False)).messages]
    if draw(st.booleans()):
        pairs = pairs[:-1]
    return {"messages": _told(pairs)}, _spoken(pairs)


@st.composite
def _prompt_completion(draw: st.DrawFn) -> tuple[dict[str, Any], Example]:
    if draw(st.booleans()):
        prompt, completion = draw(texts()), draw(texts())
        return {"prompt": prompt, "completion": completion}, _spoken([("user", prompt), ("assistant", completion)])
    pairs = [(m.role, m.content) for m in draw(conversations(inputs=False)).messages]
    return {"prompt": _told(pairs[:-1]), "completion": _told(pairs[-1:])}, _spoken(pairs)


def _document() -> st.SearchStrategy[tuple[dict[str, Any], Example]]:
    return texts().map(lambda text: ({"text": text}, Document(text, "")))


_SHAPES = {"alpaca": _alpaca(), "chat": _chat(), "prompt/completion": _prompt_completion(), "text": _document()}


@st.composite
def rows(draw: st.DrawFn) -> RowCase:
    """A row of any shape, with columns nobody reads, and what it must become."""
    shape = draw(st.sampled_from(sorted(_SHAPES)))
    values, example = draw(_SHAPES[shape])
    ignored = draw(st.lists(st.sampled_from(["id", "kind", "größe", "", "score"]), max_size=2, unique=True))
    values = {**values, **{name: draw(st.none() | st.integers() | texts()) for name in ignored}}
    if isinstance(example, Document):
        dropped = "" if example.text.strip() else "empty text"
    elif not example.messages or example.messages[-1].role != "assistant":
        dropped = "no answer at the end"
    else:
        dropped = "" if example.answer.strip() else "empty answer"
    names = draw(st.permutations(sorted(values)))
    return RowCase({name: values[name] for name in names}, shape, example, dropped, tuple(sorted(ignored)))


@dataclass(frozen=True)
class DamagedFile:
    """A data file that must be refused, and every word that the one error must hold besides the file's path."""

    suffix: str
    content: bytes
    named: tuple[str, ...] = field(default=())
    unnamed: tuple[str, ...] = field(default=())


_GOOD_LINES = ('{"text": "a"}', '{"prompt": "a", "completion": "b"}', "", "   ", '{"text": "a\\u2028b\u2028\x85"}\r')
_BROKEN_LINES = (
    "{", '{"a": }', '{"a": 1,}', "nope", '{"a": 1} {"b": 2}', "{'a': 1}", '{"a": 1', '"\t"', "]",
    '{"a": ' + "9" * 5000 + "}", "[" * 20_000,
    "[]", "3", "null", '"text"', "NaN", "true", "[{}]", '\ufeff\ufeff{"a": 1}',
)  # fmt: skip
_MISSHAPEN: tuple[dict[str, Any], ...] = (
    {}, {"a": 1}, {"instruction": "x"}, {"output": "x"}, {"prompt": "x"}, {"text": 3}, {"text": ["x"]},
    {"messages": "x"}, {"messages": {"role": "user"}}, {"messages": ["x"]}, {"messages": None},
    {"messages": [{"role": "bot", "content": "x"}]}, {"messages": [{"content": "x"}]},
    {"messages": [{"role": "user", "content": {}}]}, {"messages": [{"role": [], "content": ""}]},
    {"prompt": "x", "completion": ["y"]}, {"prompt": ["x"], "completion": [{"role": "assistant", "content": "y"}]},
    {"instruction": 1, "output": "x"}, {"instruction": "x", "output": False}, {"text": "x", "messages": []},
    {"instruction": "a", "output": "b", "prompt": "c", "completion": "d"}, {"text": "\ud800"}, {"\ud800": 1},
    {"messages": [{"role": "\udfff", "content": "x"}]}, {"prompt": "x", "completion": "\udc00y"},
)  # fmt: skip


def _lines(bad: tuple[str, ...]) -> st.SearchStrategy[DamagedFile]:
    line = st.sampled_from(_GOOD_LINES).map(lambda text: (text, False)) | st.sampled_from(bad).map(lambda t: (t, True))
    drawn = st.lists(line, min_size=1, max_size=45).filter(lambda found: any(broken for _, broken in found))
    return drawn.map(_as_lines)


def _as_lines(found: list[tuple[str, bool]]) -> DamagedFile:
    places = [f":{number}" for number, (_, broken) in enumerate(found, start=1) if broken]
    good = [f":{number}" for number, (_, broken) in enumerate(found, start=1) if not broken]
    more = [f"and {len(places) - 20} more"] if len(places) > 20 else []
    content = "\n".join(text for text, _ in found).encode()
    return DamagedFile(".jsonl", content, (*places[:20], *more), (*good, *places[20:]))


def _document_with(items: list[tuple[Any, bool]]) -> DamagedFile:
    wrong = [f"[{index}]" for index, (_, broken) in enumerate(items) if broken]
    return DamagedFile(".json", json.dumps([item for item, _ in items], indent=1).encode(), tuple(wrong))


def _documents() -> st.SearchStrategy[DamagedFile]:
    wrong: tuple[Any, ...] = (3, None, "x", [], [{}], 0.5)
    item = st.just(({"text": "a"}, False)) | st.sampled_from(wrong).map(lambda value: (value, True))
    items = st.lists(item, min_size=1, max_size=15)
    return items.filter(lambda found: any(broken for _, broken in found)).map(_document_with)


def _not_utf8() -> st.SearchStrategy[DamagedFile]:
    bad = st.sampled_from([b"\xff", b"\xc3(", b"\x80", b"\xed\xa0\x80", b"caf\xe9"])
    head = st.sampled_from([b"", b"\xef\xbb\xbf", b'{"text": "', "é🦙\n".encode()])
    return st.tuples(head, bad, st.sampled_from([".json", ".jsonl"])).map(
        lambda drawn: DamagedFile(
            drawn[2], drawn[0] + drawn[1], ("UTF-8", f"offset {len(drawn[0]) + (3 if drawn[1][:1] == b'c' else 0)}")
        )
    )


_BLANK = (b"", b" \r\n\t", b"\xef\xbb\xbf")
_EMPTY = tuple(DamagedFile(suffix, text, ("empty",)) for suffix in (".json", ".jsonl") for text in _BLANK)
_BROKEN_DOCUMENTS = (
    DamagedFile(".json", b"[]", ("no rows",)),
    DamagedFile(".json", b'[\n {"text": "a"},\n {"text": }\n]', (":3",)),
    DamagedFile(".json", b'[{"text": "a"}', (":1",)),
    DamagedFile(".json", b'{"text": "a"}\n{"text": }\n{"text": "b"}\nnope', (":2", ":4"), (":1", ":3")),
    DamagedFile(".json", b"[" * 50_000, ("nested",)),
    DamagedFile(".json", b'[{"text": ' + b"9" * 5000 + b"}]", ()),
    DamagedFile(".json", '{"text": "a"}'.encode("utf-16"), ("UTF-8", "offset 0")),
    DamagedFile(".txt", b"text\na\n", (".txt",)),
    DamagedFile("", b'{"text": "a"}', ("nothing",)),
)


def damaged_files() -> st.SearchStrategy[DamagedFile]:
    """Files that cannot be read, with the places that must be named."""
    return st.one_of(
        _lines(_BROKEN_LINES), _documents(), _not_utf8(), st.sampled_from(_EMPTY), st.sampled_from(_BROKEN_DOCUMENTS)
    )


def misshapen_files() -> st.SearchStrategy[DamagedFile]:
    """Files that can be read but hold rows that are not training data, with the places that must be named."""
    return _lines(tuple(json.dumps(value) for value in _MISSHAPEN))
