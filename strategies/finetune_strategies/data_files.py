"""Sound data files of every kind that is read, in every dress, with the rows that a reader must find and where."""

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from finetune_strategies.conversations import rows, said, texts
from finetune_strategies.picks import EITHER, pick

BOM = b"\xef\xbb\xbf"
_NEWLINES = {"lf": "\n", "crlf": "\r\n", "cr": "\r", "blank lines": "\n\n  \n"}
_TABLE_COLUMNS = (
    ("text",),
    ("prompt", "completion"),
    ("instruction", "output", "input"),
    ("id", "output", "instruction"),
)


@dataclass(frozen=True)
class GoodFile:
    """A data file that must be read: each row's place (`:3` or `[0]`) and values, and what the file is like."""

    suffix: str
    content: bytes
    rows: tuple[tuple[str, dict[str, Any]], ...]
    traits: frozenset[str]


def _odd_rows() -> st.SearchStrategy[list[dict[str, Any]]]:
    """Perhaps one row of text with a column that is hard to hold: deep, long, or with an odd name."""
    deep: Any = 0
    for _ in range(60):
        deep = [deep]
    odd: list[dict[str, Any]] = [{"n": 10**4000}, {"n": -1e308}, {"n": deep}, {"": 1}, {"größe": {"a": [None]}}]
    return st.just([]) | st.sampled_from(odd).map(lambda columns: [{"text": "odd", **columns}])


_SEVERAL_ROWS, _SOME_ROWS = (st.lists(rows(), min_size=least, max_size=5) for least in (2, 1))
_ODD_ROWS = _odd_rows()
_CELL = said() | texts() | st.sampled_from(["", 'a "b"', "a,b\tc", "a\nb", "a\r\nb", "a\rb", "a\rb", "007"])
_CELLS = {
    width: st.lists(st.lists(_CELL, min_size=width, max_size=width), min_size=1, max_size=4)
    for width in set(map(len, _TABLE_COLUMNS))
}


def good_files() -> st.SearchStrategy[GoodFile]:
    """Sound files: JSON lines, JSON lists, CSV and TSV; packed or not, with byte order marks and any line ends."""
    return good_lines() | good_lists() | good_tables()


@st.composite
def good_lines(draw: st.DrawFn) -> GoodFile:
    """One JSON object a line, in a `.jsonl` or `.json` file."""
    values = [case.values for case in draw(_SEVERAL_ROWS)] + draw(_ODD_ROWS)
    dress = draw(pick(*sorted(_NEWLINES)))
    lead = draw(pick("", "\n\n"))
    ascii_only, suffix = draw(EITHER), draw(pick(".jsonl", ".json", ".JSONL", ".ndjson"))
    lines = [json.dumps(each, ensure_ascii=ascii_only) for each in values]
    text = lead + _NEWLINES[dress].join(lines) + draw(pick("", "\n", "\n \n\n"))
    step = 3 if dress == "blank lines" else 1
    places = [f":{1 + len(lead) + step * index}" for index in range(len(values))]
    suffix, content, marked = draw(_as_bytes(text, suffix))
    found = tuple(zip(places, values, strict=True))
    return GoodFile(suffix, content, found, frozenset({"lines", dress, *marked}))


@st.composite
def good_lists(draw: st.DrawFn) -> GoodFile:
    """One JSON list of objects in a `.json` file, or a single object."""
    values = [case.values for case in draw(_SOME_ROWS)] + draw(_ODD_ROWS)
    alone = len(values) == 1 and draw(EITHER)
    text = json.dumps(values[0] if alone else values, indent=draw(pick(None, 1)), ensure_ascii=False)
    suffix, content, marked = draw(_as_bytes(text, ".json"))
    found = tuple((f"[{index}]", each) for index, each in enumerate(values))
    return GoodFile(suffix, content, found, frozenset({"one object" if alone else "list", *marked}))


@st.composite
def good_tables(draw: st.DrawFn) -> GoodFile:
    """A `.csv` or `.tsv` file below a header line; every cell is text, and cells may hold line ends and quotes."""
    columns = draw(pick(*_TABLE_COLUMNS))
    cells = draw(_CELLS[len(columns)])
    dress, suffix = draw(pick("lf", "crlf")), draw(pick(".csv", ".tsv"))
    quote_all = draw(EITHER)
    lines = [
        table_line(line, delimiter="\t" if suffix == ".tsv" else ",", newline=_NEWLINES[dress], quote_all=quote_all)
        for line in [list(columns), *cells]
    ]
    if draw(EITHER):
        lines.insert(1, _NEWLINES[dress])
    suffix, content, marked = draw(_as_bytes("".join(lines), suffix))
    starts = [1 + sum(map(count_line_ends, lines[:index])) for index in range(len(lines))]
    places = [f":{start}" for start in starts[len(lines) - len(cells) :]]
    found = tuple((place, dict(zip(columns, line, strict=True))) for place, line in zip(places, cells, strict=True))
    inside = {"line end in a cell"} if any(count_line_ends(each) for line in cells for each in line) else set()
    inside |= {"lone carriage return in a cell"} if any("a\rb" in line for line in cells) else set()
    return GoodFile(suffix, content, found, frozenset({"table", dress, *marked, *inside}))


def table_line(cells: Sequence[str], *, delimiter: str = ",", newline: str = "\n", quote_all: bool = False) -> str:
    """One row of a table as text, with its line end; quoted are the cells that must be, or all of them."""
    # By hand: not every Python quotes a lone carriage return, which every reader takes for the end of a line.
    special = {delimiter, '"', "\r", "\n"}
    quoted = ['"' + cell.replace('"', '""') + '"' if quote_all or special & set(cell) else cell for cell in cells]
    return (delimiter.join(quoted) or '""') + newline


def count_line_ends(text: str) -> int:
    """How many lines end in a text, however they end."""
    return len(re.findall("\r\n|\r|\n", text))


@st.composite
def _as_bytes(draw: st.DrawFn, text: str, suffix: str) -> tuple[str, bytes, set[str]]:
    """A text as bytes, in UTF-8 or another encoding with its mark, perhaps packed; its suffix, and what was done."""
    encoding = draw(pick("", "", "mark", "mark", "UTF-16"))
    content = {"mark": BOM + text.encode(), "UTF-16": text.encode("utf-16")}.get(encoding, text.encode())
    packing = draw(pick("", "", "", *_PACKINGS))
    if packing:
        suffix, content = suffix + draw(pick(packing, packing.upper())), _PACKINGS[packing](content)
    return suffix, content, {encoding, "packed" if packing else ""} - {""}


def _gzipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


_PACKINGS: dict[str, Callable[[bytes], bytes]] = {".gz": _gzipped, ".bz2": bz2.compress, ".xz": lzma.compress}
