"""Data files that must be refused, each with what is wrong and every place that the one error must name."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from finetune_strategies.data_files import BOM, table_line

SHOWN = 20
"""So many places are named in full; the rest are counted."""


@dataclass(frozen=True)
class DamagedFile:
    """A data file that must be refused, and what was done to it.

    `named`: every word that the one error must hold besides the file's path; `unnamed`: what it must not hold, the
    places where nothing is wrong.
    """

    suffix: str
    content: bytes
    named: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()
    damage: str = ""


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
    "missing column": ({}, {"a": 1}, {"instruction": "x"}, {"output": "x"}, {"prompt": "x"}, {"completion": "x"}),
    "several shapes": (
        {"text": "x", "messages": []}, {"instruction": "a", "output": "b", "prompt": "c", "completion": "d"},
    ),
    "wrong type": (
        {"text": 3}, {"text": ["x"]}, {"messages": "x"}, {"messages": {"role": "user"}}, {"messages": ["x"]},
        {"messages": None}, {"messages": [{"role": "user", "content": {}}]}, {"prompt": "x", "completion": ["y"]},
        {"instruction": 1, "output": "x"}, {"instruction": "x", "output": False},
        {"prompt": ["x"], "completion": [{"role": "assistant", "content": "y"}]},
    ),
    "unknown role": (
        {"messages": [{"role": "bot", "content": "x"}]}, {"messages": [{"content": "x"}]},
        {"messages": [{"role": [], "content": ""}]}, {"messages": [{"role": "\udfff", "content": "x"}]},
    ),
    "half a surrogate pair": ({"text": "\ud800"}, {"\ud800": 1}, {"prompt": "x", "completion": "\udc00y"}),
}  # fmt: skip
_MISSHAPEN_LINES = {damage: tuple(map(json.dumps, rows)) for damage, rows in _MISSHAPEN.items()}
DAMAGES = (
    *BROKEN_LINES, "not an object in a list", "cut off list", "cut off line", "not UTF-8", "latin-1", "UTF-16",
    "UTF-16 without a mark", "empty", "no rows", "broken list", "too deep list", "too many digits in a list",
    "unknown ending", "ragged table", "open quote", "text after a quote", "column twice",
)  # fmt: skip
MISSHAPES = (*_MISSHAPEN, "unknown header")


def damaged_files() -> st.SearchStrategy[DamagedFile]:
    """Files that cannot be read, with the places that must be named; every one of `DAMAGES` comes up."""
    fixed = st.sampled_from(_FIXED)
    return st.one_of(_lines(BROKEN_LINES), _lists(), _cut_off(), _foreign(), fixed, _tables(), _quotes())


def misshapen_files() -> st.SearchStrategy[DamagedFile]:
    """Files that can be read but hold rows that are no training data; every one of `MISSHAPES` comes up."""
    return _lines(_MISSHAPEN_LINES) | st.lists(st.sampled_from(["a", "b", ""]), min_size=1, max_size=3).map(_headless)


@st.composite
def _lines(draw: st.DrawFn, broken: dict[str, tuple[str, ...]]) -> DamagedFile:
    """Good lines with broken ones among them; the damage is that of the first."""
    good = st.sampled_from(_GOOD_LINES).map(lambda line: ("", line))
    bad = st.sampled_from(sorted(broken)).flatmap(
        lambda damage: st.sampled_from(broken[damage]).map(lambda line: (damage, line))
    )
    found = [draw(bad), *draw(st.lists(good | bad, max_size=44))]
    at = draw(st.integers(0, len(found) - 1))
    found = [*found[1 : at + 1], found[0], *found[at + 1 :]]
    damage = next(damage for damage, _ in found if damage)
    places = [(f":{number}", bool(damage)) for number, (damage, _) in enumerate(found, start=1)]
    return _naming(".jsonl", "\n".join(line for _, line in found).encode(), places, damage)


def _naming(suffix: str, content: bytes, places: Iterable[tuple[str, bool]], damage: str) -> DamagedFile:
    wrong = [place for place, broken in places if broken]
    sound = [place for place, broken in places if not broken]
    more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    return DamagedFile(suffix, content, (*wrong[:SHOWN], *more), (*sound, *wrong[SHOWN:]), damage)


@st.composite
def _lists(draw: st.DrawFn) -> DamagedFile:
    wrong: tuple[Any, ...] = (3, None, "x", [], [{}], 0.5)
    item = st.just(({"text": "a"}, False)) | st.sampled_from(wrong).map(lambda value: (value, True))
    items = [(draw(st.sampled_from(wrong)), True), *draw(st.lists(item, max_size=14))]
    items = draw(st.permutations(items))
    content = json.dumps([value for value, _ in items], indent=1).encode()
    places = [(f"[{index}]", broken) for index, (_, broken) in enumerate(items)]
    return _naming(".json", content, places, "not an object in a list")


@st.composite
def _cut_off(draw: st.DrawFn) -> DamagedFile:
    """A sound file that ends too early, as after a full disk or a broken download."""
    rows = draw(st.lists(st.sampled_from(_GOOD_LINES[:2]).map(json.loads), min_size=1, max_size=4))
    lines = [json.dumps(row) for row in rows]
    if draw(st.booleans()):
        left = draw(st.integers(1, len(lines[-1]) - 1))
        places = [(f":{number}", number == len(lines)) for number in range(1, len(lines) + 1)]
        return _naming(".jsonl", "\n".join([*lines[:-1], lines[-1][:left]]).encode(), places, "cut off line")
    content = json.dumps(rows, indent=1).encode()
    return DamagedFile(".json", content[: draw(st.integers(1, len(content) - 1))], ("broken JSON",), (), "cut off list")


@st.composite
def _foreign(draw: st.DrawFn) -> DamagedFile:
    """Bytes in no encoding, in another one than UTF-8, or with one wrong byte after a sound beginning."""
    suffix = draw(st.sampled_from([".jsonl", ".json", ".csv"]))
    text = draw(st.sampled_from(['{"text": "café"}', '{"text": "a"}\n{"text": "naïve"}\n']))
    if draw(st.booleans()):
        return DamagedFile(suffix, text.encode("utf-16"), ("UTF-8", "offset 0"), (), "UTF-16")
    if draw(st.booleans()):
        content = text.encode("latin-1")
        at = next(index for index, byte in enumerate(content) if byte > 127)
        return DamagedFile(suffix, content, ("UTF-8", f"offset {at}"), (), "latin-1")
    head = draw(st.sampled_from([b"", BOM, b'{"text": "', "é🦙\n".encode()]))
    bad, at = draw(st.sampled_from([(b"\xff", 0), (b"\xc3(", 0), (b"\x80", 0), (b"\xed\xa0\x80", 0), (b"caf\xe9", 3)]))
    return DamagedFile(suffix, head + bad, ("UTF-8", f"offset {len(head) + at}"), (), "not UTF-8")


@st.composite
def _tables(draw: st.DrawFn) -> DamagedFile:
    """A table some of whose rows have too few or too many cells."""
    columns = draw(st.sampled_from([("prompt", "completion"), ("instruction", "output", "input")]))
    width = len(columns)
    kinds = [0, *draw(st.lists(st.sampled_from([0, 1, width]), max_size=30))]  # 0: ragged, 1: sound, else: blank
    kinds = draw(st.permutations(kinds))
    lines, places = [table_line(columns)], []
    for number, kind in enumerate(kinds, start=2):
        wrong = draw(st.sampled_from([count for count in range(1, width + 3) if count != width]))
        lines.append("\n" if kind == width else table_line(["x"] * (width if kind else wrong)))
        places.append((f":{number}", kind == 0))
    return _naming(".csv", "".join(lines).encode(), places, "ragged table")


@st.composite
def _quotes(draw: st.DrawFn) -> DamagedFile:
    """A table with a quote that is not closed, or with text behind a closed one."""
    before = draw(st.integers(0, 5))
    lines = ["text,id\n", *(f'"a {number}",b\n' for number in range(before))]
    damage, line = draw(st.sampled_from([("open quote", '"a,b\nc,d\n'), ("text after a quote", '"a"b,c\n')]))
    places = [(f":{number}", number == before + 2) for number in range(1, before + 3)]
    return _naming(".csv", "".join([*lines, line]).encode(), places, damage)


def _headless(cells: list[str]) -> DamagedFile:
    """A table whose header names no columns that anybody knows."""
    lines = ["question,reply\n", *(table_line([cell, "x"]) for cell in cells)]
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
    DamagedFile(".jsonl", '{"text": "a"}'.encode("utf-16-le"), (":1",), (), "UTF-16 without a mark"),
    DamagedFile(".csv", b"text,id,text\na,b,c\n", ("'text'", "twice"), (), "column twice"),
    DamagedFile(".txt", b'{"text": "a"}', (".txt",), (), "unknown ending"),
    DamagedFile("", b'{"text": "a"}', ("nothing",), (), "unknown ending"),
)
