"""Reads data files row by row and remembers where each row stood."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.data.tables import arrow_rows, parquet_rows, table_rows
from finetune.data.unpack import (
    LONGEST_ROW,
    PACKED_SUFFIXES,
    open_data,
    row_too_long,
    text_blocks,
    text_lines,
    whole_text,
)
from finetune.errors import DataError, FileProblems
from finetune.records import Row


def read_rows(path: Path, *, limit: int | None = None) -> list[Row]:
    """Read a data file into rows, or the first `limit` of them.

    Raises:
        DataError: as `iter_rows`.
    """
    return list(islice(iter_rows(path), limit))


def iter_rows(path: Path) -> Iterator[Row]:
    """The rows of a data file, one by one; each kind by its suffix, text also packed (`rows.jsonl.gz`).

    Raises:
        DataError: the file is missing, a folder, empty, no text, damaged at some line, holds something other than
            rows, or unpacks to far more than rows do. Every broken line is named (the first twenty in full).
        MissingExtraError: a Parquet, Arrow or zstd file, and pyarrow is not installed.
    """
    kind = kind_of(path)
    if not kind:
        with open_data(path):  # what is missing, or a folder, is told first
            pass
        named = f"ends in {path.suffix or 'nothing'!r}"
        if path.suffix.lower() in PACKED_SUFFIXES:
            named += f", and {Path(path.stem).suffix or 'nothing'!r} before it"
        raise DataError(
            f"{path} {named}",
            hint=f"use one of: {', '.join(KINDS)}; those of text also packed, such as .jsonl.gz",
        )
    found = False
    for row in _READERS[kind](path):
        found = True
        yield row
    if not found:
        raise DataError(f"{path} holds no rows", hint="put one row on each line")


def kind_of(path: Path) -> str:
    """What a file holds, by its suffix before that of its packing; "" for nothing that can be read."""
    packed = path.suffix.lower() in PACKED_SUFFIXES
    suffix = (Path(path.stem) if packed else path).suffix.lower()
    return suffix if suffix in _READERS and not (packed and suffix in (".parquet", ".arrow")) else ""


def _json_lines(path: Path) -> Iterator[Row]:
    """The rows of one JSON object a line; empty lines are skipped."""
    problems = FileProblems("each line must be one JSON object")
    filled = False
    for number, line in text_lines(path):
        if not (line := line.rstrip("\r\n")).strip():
            continue
        filled, where = True, f"{path}:{number}"
        try:
            yield _as_row(load_json(line), where)
        except json.JSONDecodeError as error:
            problems.append(f"{where}: broken JSON at column {error.colno}: {error.msg}")
        except (RecursionError, ValueError) as error:
            problems.append(f"{where}: {unreadable(error)}")
        except DataError as error:
            problems.append(error.message)
    problems.raise_all()
    if not filled:
        raise _empty(path)


def _json_document(path: Path) -> Iterator[Row]:
    """The rows of one JSON document: a list of objects, columns, a list under one key, one object; or one a line."""
    start = next((block.lstrip() for block in text_blocks(path) if not block.isspace()), "")
    if not start:
        raise _empty(path)
    first, _, others = start.partition("\n")
    if start.startswith("["):
        yield from _json_list(path)
        return
    if others and not others.isspace() and _is_json(first):
        yield from _json_lines(path)
        return
    text = whole_text(path)
    try:
        document = load_json(text)
    except json.JSONDecodeError as error:
        first = text.strip().splitlines()[0].strip()
        if error.msg == "Extra data" or (first.startswith("{") and first.endswith("}")):
            yield from _json_lines(path)
            return
        raise DataError(
            f"{path}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}",
            hint=_ONE_LIST,
        ) from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: {unreadable(error)}", hint=_SHORTER) from None
    items, within = _within(path, document)
    problems = FileProblems(_OBJECTS)
    for index, item in enumerate(items):
        try:
            yield _as_row(item, f"{path}{within}[{index}]")
        except DataError as error:
            problems.append(error.message)
    problems.raise_all()


_ONE_LIST, _OBJECTS = "a .json file holds one list of objects", "each element must be a JSON object"
_SHORTER = "flatten or shorten the rows"


def _json_list(path: Path) -> Iterator[Row]:
    """The rows of one JSON list; no more of it is held at once than one of them, and a block."""
    problems = FileProblems(_OBJECTS)
    found = 0
    text = _JsonText(path, text_blocks(path, lambda: found))
    text.next_sign()
    sign, text.at = "", text.at + 1
    if text.next_sign() == "]":
        sign, text.at = "]", text.at + 1
    while sign != "]":
        value = text.value(where := f"{path}[{found}]")
        try:
            yield _as_row(value, where)
        except DataError as error:
            problems.append(error.message)
        found += 1
        if (sign := text.next_sign()) not in (",", "]"):
            raise text.broken("Expecting ',' delimiter", text.at)
        text.at += 1
        text.next_sign()
    if text.next_sign():
        raise text.broken("Extra data", text.at)
    problems.raise_all()


class _JsonText:
    """The part of a long JSON text that is held, from block to block, and where in its file that begins."""

    _SPACES = re.compile(r"[ \t\n\r]*")
    _CUT_OFF = 16
    """Characters before the end of a block in which a number, a word or an escape may be that goes on behind it."""

    def __init__(self, path: Path, blocks: Iterator[str]) -> None:
        self._path, self._blocks, self._text = path, blocks, ""
        self._line = self._column = 1
        self.at = 0

    def next_sign(self) -> str:
        """Pass over spaces; the character behind them, or nothing at the end."""
        while True:
            spaces = self._SPACES.match(self._text, self.at)
            self.at = spaces.end() if spaces else self.at
            if self.at < len(self._text) or not self._read_on():
                return self._text[self.at : self.at + 1]

    def value(self, where: str) -> Any:
        """The value that begins here; it is passed over.

        Raises:
            DataError: it is none, or too long.
        """
        while True:
            try:
                found, end = _DECODER.raw_decode(self._text, self.at)
            except json.JSONDecodeError as error:
                goes_on = error.msg.startswith("Unterminated string") or error.pos + self._CUT_OFF >= len(self._text)
                if goes_on and len(self._text) - self.at > LONGEST_ROW:
                    raise row_too_long(where) from None
                if not goes_on or not self._read_on():
                    raise self.broken(error.msg, error.pos) from None
            except (RecursionError, ValueError) as error:
                raise DataError(f"{where}: {unreadable(error)}", hint=_SHORTER) from None
            else:
                if end + self._CUT_OFF < len(self._text) or not self._read_on():
                    self.at = end
                    return found

    def broken(self, what: str, at: int) -> DataError:
        """What is wrong with the JSON at a place of what is held."""
        line, column = self._place(at)
        return DataError(f"{self._path}:{line}: broken JSON at column {column}: {what}", hint=_ONE_LIST)

    def _place(self, at: int) -> tuple[int, int]:
        lines = self._text.count("\n", 0, at)
        return self._line + lines, at - self._text.rfind("\n", 0, at) if lines else self._column + at

    def _read_on(self) -> bool:
        """Forget what was passed, and hold twice as much as is left, or a block; False at the end."""
        parts, more = [self._text[self.at :]], 0
        while more <= len(parts[0]) and (block := next(self._blocks, "")):
            parts.append(block)
            more += len(block)
        if more:
            self._line, self._column = self._place(self.at)
            self._text, self.at = "".join(parts), 0
        return more > 0


def _is_json(line: str) -> bool:
    try:
        load_json(line)
    except (RecursionError, ValueError):
        return False
    return True


def _within(path: Path, document: Any) -> tuple[Sequence[Any], str]:
    """The rows in a document that is no list, and the key below which they are, if any.

    Several columns of one length, or a list of rows below a key, are told from one row by what is in the lists: a
    row's own lists hold messages, tools or texts.
    """
    if not isinstance(document, dict):
        return [document], ""
    if columns := _columns(document):
        names, cells = [*columns], [*columns.values()]
        return [dict(zip(names, each, strict=True)) for each in zip(*cells, strict=True)], ""
    lists = [key for key, value in document.items() if _is_rows(key, value)]
    if len(lists) > 1:
        keys, first = ", ".join(repr(key[:60]) for key in lists[:20]), lists[0]
        say = f"import json; [print(json.dumps(row)) for row in json.load(open({str(path)!r}))[{first!r}]]"
        how = f"python -c {shlex.quote(say)} > {shlex.quote(first)}.jsonl"
        raise DataError(
            f"{path} holds several lists of rows: {keys}",
            hint=f"keep one list in a file, for example with: {how}",
        )
    return (document[lists[0]], f" {lists[0]}") if lists else ([document], "")


def _columns(document: Mapping[str, Any]) -> Mapping[str, Sequence[Any]]:
    """The columns of a document that is a table, or nothing: lists of one length, or pandas' objects by row number."""
    values = [*document.values()]
    if values and all(isinstance(each, dict) and each and all(map(str.isdigit, each)) for each in values):
        same = all(each.keys() == values[0].keys() for each in values)
        return {name: [*cells.values()] for name, cells in document.items()} if same else {}
    if not values or not all(isinstance(each, list) and len(each) == len(values[0]) > 0 for each in values):
        return {}
    # Lists of objects alone are a row's own messages, or rows below a key.
    alone = all(isinstance(item, dict) for each in values for item in each)
    return {} if alone else document


def _is_rows(key: str, value: object) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return False
    return key not in _LISTS_OF_A_ROW and not any(item.keys() & {"role", "from"} for item in value)


_LISTS_OF_A_ROW = ("messages", "conversations", "conversation", "prompt", "completion", "tools", "documents")


class _KeyTwiceError(ValueError):
    """An object names a key twice: JSON's grammar allows it, and every reader silently keeps the last."""


def load_json(text: str) -> Any:
    """What a JSON text holds; an object that names a key twice is refused with a ValueError."""
    return _decoder().decode(text)


@cache
def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _KeyTwiceError(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats)


def unreadable(error: RecursionError | ValueError) -> str:
    """Why text that is JSON by its grammar is refused."""
    if isinstance(error, _KeyTwiceError):
        return f"key {str(error)[:60]!r} is there twice"
    return "JSON nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def _as_row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__} {str(value)[:60]!r}")
    return Row(value, where)


def _text(path: Path) -> Iterator[Row]:
    """Each line of a text as a document; empty lines are skipped."""
    problems = FileProblems("name a file of text")
    for number, line in text_lines(path):
        if "\0" in line:
            problems.append(f"{path}:{number}: a NUL, so it is no text")
        elif not line.isspace():
            yield Row({"text": line.rstrip("\r\n")}, f"{path}:{number}")
    problems.raise_all()


def _empty(path: Path) -> DataError:
    return DataError(f"{path} is empty", hint="put one row on each line")


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_document,
    ".csv": table_rows,
    ".tsv": table_rows,
    ".txt": _text,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
KINDS = tuple(_READERS)
"""The suffixes of what can be read."""
