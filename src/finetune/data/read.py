"""Reads data files row by row and remembers where each row stood."""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.data.tables import arrow_rows, parquet_rows, table_rows
from finetune.data.unpack import PACKED_SUFFIXES, open_data, text_lines, whole_text
from finetune.errors import DataError, raise_all
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
    problems: list[str] = []
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
    raise_all(problems, hint="each line must be one JSON object")
    if not filled:
        raise _empty(path)


def _json_document(path: Path) -> Iterator[Row]:
    """The rows of one JSON document: a list of objects, columns, a list under one key, one object; or one a line."""
    text = whole_text(path)
    if not text.strip():
        raise _empty(path)
    try:
        document = load_json(text)
    except json.JSONDecodeError as error:
        first = text.strip().splitlines()[0].strip()
        if error.msg == "Extra data" or (first.startswith("{") and first.endswith("}")):
            yield from _json_lines(path)
            return
        raise DataError(
            f"{path}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}",
            hint="a .json file holds one list of objects",
        ) from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: {unreadable(error)}", hint="flatten or shorten the rows") from None
    items, within = (document, "") if isinstance(document, list) else _within(path, document)
    problems: list[str] = []
    for index, item in enumerate(items):
        try:
            yield _as_row(item, f"{path}{within}[{index}]")
        except DataError as error:
            problems.append(error.message)
    raise_all(problems, hint="each element must be a JSON object")


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
    return json.loads(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _KeyTwiceError(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
    return values


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
    problems: list[str] = []
    for number, line in text_lines(path):
        if "\0" in line:
            problems.append(f"{path}:{number}: a NUL, so it is no text")
        elif not line.isspace():
            yield Row({"text": line.rstrip("\r\n")}, f"{path}:{number}")
    raise_all(problems, hint="name a file of text")


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
