"""Data files that must be refused, each with what is wrong and every place that the one error must name."""

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from finetune_strategies.data_files import BOM, table_line
from finetune_strategies.picks import EITHER, between, pick

SHOWN = 20
"""So many places are named in full; the rest are counted."""


@dataclass(frozen=True)
class DamagedFile:
    """A data file that must be refused, and what was done to it.

    `named`: every word that the one error must hold besides the file's path; `unnamed`: what it must not hold, the
    places where nothing is wrong; `wrong`: how many places are, where they are counted.
    """

    suffix: str
    content: bytes
    named: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()
    damage: str = ""
    wrong: int = 0


_GOOD_LINES = ('{"text": "a"}', '{"prompt": "a", "completion": "b"}', "", "   ", '{"text": "a\\u2028b\u2028\x85"}\r')
BROKEN_LINES = {
    "cut off": ("{", '{"a": 1', '{"a": ', '"\t"', "]"),
    "not JSON": ("nope", '{"a": }', '{"a": 1,}', "{'a': 1}", '{"a": 1} {"b": 2}', '\ufeff\ufeff{"a": 1}'),
    "not an object": ("[]", "3", "null", '"text"', "NaN", "true", "[{}]"),
    "key twice": ('{"text": "a", "text": "b"}', '{"a": {"b": 1, "c": 2, "b": 1}}'),
    "too deep": ("[" * 20_000, '{"a": ' * 20_000),
    "too many digits": ('{"a": ' + "9" * 5000 + "}",),
    "NUL byte": ('{"text": "\0"}', "\0", '{"text"\0: "a"}'),
}
"""Lines that are no row, by what is wrong with them."""
_MISSHAPEN: dict[str, tuple[dict[str, Any], ...]] = {
    "missing column": (
        *({}, {"a": 1}, {"instruction": "x"}, {"output": "x"}, {"prompt": "x"}, {"completion": "x"}),
        *({"\ud800": 1}, {"conversations": "x"}),
    ),
    "several shapes": (
        {"conversations": [{"from": "human"}], "dialog": [{"from": "human"}]},
        {"instruction": "a", "output": "b", "prompt": "c", "completion": "d"},
        {"question": "a", "answer": "b", "response": "c"},
    ),
    "unread judgement": (
        {"prompt": "a", "completion": "b", "label": False},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "completion": "b", "weight": 0.5},
    ),
}
UNUSABLE: tuple[dict[str, Any], ...] = (
    {"text": 3},
    {"text": ["x"]},
    {"messages": "x"},
    {"messages": None},
    {"messages": {"role": "user", "content": 3}},
    {"messages": ["x"]},
    {"messages": [{"role": "user", "content": {}}]},
    {"prompt": "x", "completion": [3]},
    {"instruction": 1, "output": "x"},
    {"instruction": "x", "output": False},
    {"prompt": ["x", "y"], "completion": [{"role": "assistant", "content": "y"}]},
    {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": [{"content": "x"}]},
    {"messages": [{"role": [], "content": ""}]},
    {"messages": [{"role": "\udfff", "content": "x"}]},
    {"text": "\ud800"},
    {"prompt": "x", "completion": "\udc00y"},
    {"prompt": "x", "completion": "y", "image": "cat.png"},
    {"conversations": [{"from": "function_call", "value": "f(x)"}]},
    {"system": "a", "messages": [{"role": "system", "content": "b"}]},
)
"""Rows of a known shape that their own content makes unusable."""
_MISSHAPEN_LINES = {damage: tuple(map(json.dumps, rows)) for damage, rows in _MISSHAPEN.items()}
DAMAGES = (
    *BROKEN_LINES,
    "not an object in a list",
    "cut off list",
    "cut off line",
    "not UTF-8",
    "latin-1",
    "UTF-16",
    "broken gzip",
    "empty",
    "no rows",
    "broken list",
    "too deep list",
    "too many digits in a list",
    "unknown ending",
    "ragged table",
    "open quote",
    "text after a quote",
    "column twice",
)
MISSHAPES = (*_MISSHAPEN, "unknown header")


def damaged_files() -> st.SearchStrategy[DamagedFile]:
    """Files that cannot be read, with the places that must be named; every one of `DAMAGES` comes up."""
    return st.one_of(_lines(_BROKEN), _lists(), _cut_off(), _foreign(), st.sampled_from(_FIXED), _tables(), _quotes())


def misshapen_files() -> st.SearchStrategy[DamagedFile]:
    """Files that can be read but hold rows made in no known way; every one of `MISSHAPES` comes up.

    Of them the first place is to be named, and how many others there are.
    """
    files = _lines(_WRONG) | st.lists(st.sampled_from(["a", "b", ""]), min_size=1, max_size=3).map(_headless)
    return files.map(
        lambda file: replace(file, named=file.named[:1], unnamed=file.unnamed[: -file.wrong + SHOWN or None])
    )


_Line = tuple[str, str]


def _kinds_of_lines(broken: Mapping[str, Sequence[str]]) -> tuple[st.SearchStrategy[_Line], ...]:
    """A line with its damage: a broken one, and any, of which half are good; no damage is likelier than another."""
    lines = {"": _GOOD_LINES, **{damage: broken[damage] for damage in sorted(broken)}}
    of_kind = {damage: st.sampled_from([(damage, line) for line in found]) for damage, found in lines.items()}
    bad = sorted(broken)
    return tuple(st.sampled_from(kinds).flatmap(of_kind.__getitem__) for kinds in (bad, [""] * len(bad) + bad))


_BROKEN, _WRONG = _kinds_of_lines(BROKEN_LINES), _kinds_of_lines(_MISSHAPEN_LINES)
_MORE_LINES = {kinds: st.lists(kinds[1], max_size=44) for kinds in (_BROKEN, _WRONG)}


@st.composite
def _lines(draw: st.DrawFn, kinds: tuple[st.SearchStrategy[_Line], ...]) -> DamagedFile:
    """Good lines with broken ones among them; the damage is that of the first."""
    found = draw(_MORE_LINES[kinds])
    found.insert(draw(between(0, len(found))), draw(kinds[0]))
    damage = next(damage for damage, _ in found if damage)
    places = [(f":{number}", bool(damage)) for number, (damage, _) in enumerate(found, start=1)]
    return _naming(".jsonl", "\n".join(line for _, line in found).encode(), places, damage)


def _naming(suffix: str, content: bytes, places: Iterable[tuple[str, bool]], damage: str) -> DamagedFile:
    wrong = [place for place, broken in places if broken]
    sound = [place for place, broken in places if not broken]
    more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    return DamagedFile(suffix, content, (*wrong[:SHOWN], *more), (*sound, *wrong[SHOWN:]), damage, len(wrong))


_WRONG_ITEMS: tuple[Any, ...] = (3, None, "x", [], [{}], 0.5)
_WRONG_ITEM = st.sampled_from(_WRONG_ITEMS)
_ITEMS = st.lists(
    st.sampled_from([*[({"text": "a"}, False)] * len(_WRONG_ITEMS), *((item, True) for item in _WRONG_ITEMS)]),
    max_size=14,
)


@st.composite
def _lists(draw: st.DrawFn) -> DamagedFile:
    items = draw(_ITEMS)
    items.insert(draw(between(0, len(items))), (draw(_WRONG_ITEM), True))
    content = json.dumps([value for value, _ in items], indent=1).encode()
    places = [(f"[{index}]", broken) for index, (_, broken) in enumerate(items)]
    return _naming(".json", content, places, "not an object in a list")


_SOUND_LINES = st.lists(st.sampled_from(_GOOD_LINES[:2]), min_size=1, max_size=4)


@st.composite
def _cut_off(draw: st.DrawFn) -> DamagedFile:
    """A sound file that ends too early, as after a full disk or a broken download."""
    lines = draw(_SOUND_LINES)
    if draw(EITHER):
        left = draw(between(1, len(lines[-1]) - 1))
        places = [(f":{number}", number == len(lines)) for number in range(1, len(lines) + 1)]
        return _naming(".jsonl", "\n".join([*lines[:-1], lines[-1][:left]]).encode(), places, "cut off line")
    content = json.dumps([json.loads(line) for line in lines], indent=1).encode()
    return DamagedFile(".json", content[: draw(between(1, len(content) - 1))], ("broken JSON",), (), "cut off list")


@st.composite
def _foreign(draw: st.DrawFn) -> DamagedFile:
    """Bytes in no encoding, in another one than UTF-8, or with one wrong byte after a sound beginning."""
    suffix = draw(pick(".jsonl", ".json", ".csv"))
    text = draw(pick('{"text": "café"}', '{"text": "a"}\n{"text": "naïve"}\n'))
    if draw(EITHER):
        return DamagedFile(suffix, text.encode("utf-16")[:-1], ("UTF-16", "truncated"), (), "UTF-16")
    if draw(EITHER):
        content = text.encode("latin-1")
        at = next(index for index, byte in enumerate(content) if byte > 127)
        return DamagedFile(suffix, content, ("UTF-8", f"offset {at}"), (), "latin-1")
    head = draw(pick(b"", BOM, b'{"text": "', "é🦙\n".encode()))
    bad, at = draw(pick((b"\xff", 0), (b"\xc3(", 0), (b"\x80", 0), (b"\xed\xa0\x80", 0), (b"caf\xe9", 3)))
    return DamagedFile(suffix, head + bad, ("UTF-8", f"offset {len(head) + at}"), (), "not UTF-8")


_KINDS_OF_ROWS = st.lists(st.sampled_from([0, 1, 2]), max_size=30)


@st.composite
def _tables(draw: st.DrawFn) -> DamagedFile:
    """A table some of whose rows have too few or too many cells."""
    columns = draw(pick(("prompt", "completion"), ("instruction", "output", "input")))
    width = len(columns)
    kinds = draw(_KINDS_OF_ROWS)  # 0: ragged, 1: sound, 2: blank
    kinds.insert(draw(between(0, len(kinds))), 0)
    lines, places = [table_line(columns)], []
    for number, kind in enumerate(kinds, start=2):
        cells = width if kind else draw(pick(*(count for count in range(1, width + 3) if count != width)))
        lines.append("\n" if kind == 2 else table_line(["x"] * cells))
        places.append((f":{number}", kind == 0))
    return _naming(".csv", "".join(lines).encode(), places, "ragged table")


@st.composite
def _quotes(draw: st.DrawFn) -> DamagedFile:
    """A table with a quote that is not closed, or with text behind a closed one."""
    before = draw(between(0, 5))
    lines = ["text,id\n", *(f'"a {number}",b\n' for number in range(before))]
    damage, line = draw(pick(("open quote", '"a,b\nc,d\n'), ("text after a quote", '"a"b,c\n')))
    places = [(f":{number}", number == before + 2) for number in range(1, before + 3)]
    return _naming(".csv", "".join([*lines, line]).encode(), places, damage)


def _headless(cells: list[str]) -> DamagedFile:
    lines = ["frage,antwort\n", *(table_line([cell, "x"]) for cell in cells)]
    places = [(f":{number}", True) for number in range(2, len(cells) + 2)]
    return _naming(".csv", "".join(lines).encode(), places, "unknown header")


_BLANK = (b"", b" \r\n\t", BOM)
_FIXED = (
    *(DamagedFile(suffix, text, ("empty",), (), "empty") for suffix in (".json", ".jsonl", ".csv") for text in _BLANK),
    DamagedFile(".json", b"[]", ("no rows",), (), "no rows"),
    DamagedFile(".csv", b"text\n", ("no rows",), (), "no rows"),
    DamagedFile(".json", b'[\n {"text": "a"},\n {"text": }\n]', (":3",), (), "broken list"),
    DamagedFile(".json", b'{"text": "a"}\n{"text": }\n{"text": "b"}\nnope', (":2", ":4"), (":1", ":3"), "not JSON"),
    DamagedFile(".json", b"[" * 50_000, ("nested",), (), "too deep list"),
    DamagedFile(".json", b'[{"text": ' + b"9" * 5000 + b"}]", ("digits",), (), "too many digits in a list"),
    *(
        DamagedFile(suffix, gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:left], ("broken gzip",), (), "broken gzip")
        for suffix, left in ((".jsonl.gz", 30), (".json", -1), (".ndjson.gz", -8))
    ),
    DamagedFile(".csv", b"text,id,text\na,b,c\n", ("'text'", "twice"), (), "column twice"),
    DamagedFile(".doc", b'{"text": "a"}', (".doc",), (), "unknown ending"),
    DamagedFile("", b'{"text": "a"}', ("nothing",), (), "unknown ending"),
)
