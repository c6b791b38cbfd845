"""Reads data files row by row and remembers where each row stood."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.errors import DataError, MissingExtraError, install_line
from finetune.records import Row

_LONGEST_CELL = 2**31 - 1
"""Without it the csv module refuses cells of over 131,072 characters; a document may be longer."""


def read_rows(path: Path, *, limit: int | None = None) -> list[Row]:
    """Read a data file into rows: `.jsonl`, `.json` (a list, or an object a line), `.csv`, `.tsv` or `.parquet`.

    Raises:
        DataError: the file is missing, a folder, empty, not UTF-8, damaged at some line, or holds something other
            than rows. Every broken line is named (the first twenty in full).
        MissingExtraError: a Parquet file, and pyarrow is not installed.
    """
    content = _read_bytes(path)
    rows = _READERS[path.suffix.lower()](path, content)
    if not rows:
        raise DataError(f"{path} holds no rows", hint="put one row on each line")
    return rows if limit is None else rows[:limit]


def raise_all(problems: list[str], *, hint: str, what: str = "the data cannot be used") -> None:
    """Raise one DataError that names every problem (twenty in full, the rest counted); nothing when there is none."""
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise DataError("\n  ".join([f"{what}:", *problems[:20], *more]), hint=hint)


def _read_bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder, not a data file", hint="name the data file inside it")
        if path.suffix.lower() not in _READERS:
            kinds = ", ".join(sorted(_READERS))
            raise DataError(f"{path} ends in {path.suffix or 'nothing'!r}", hint=f"use one of: {kinds}")
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist", hint="check the path (data.train or --data)") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path} cannot be read: {reason}", hint="check the path and its permissions") from None
    if not content.strip():
        raise DataError(f"{path} is empty", hint="put one row on each line")
    return content


def _decoded(path: Path, content: bytes) -> str:
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}",
            hint="convert it, for example with: iconv -f latin1 -t utf-8",
        ) from None
    if not text.strip():
        raise DataError(f"{path} is empty", hint="put one row on each line")
    return text


def _parse_lines(path: Path, text: str) -> list[Row]:
    """The rows of one JSON object a line; empty lines are skipped."""
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            rows.append(_as_row(load_json(line), where))
        except json.JSONDecodeError as error:
            problems.append(f"{where}: broken JSON at column {error.colno}: {error.msg}")
        except (RecursionError, ValueError) as error:
            problems.append(f"{where}: {unreadable(error)}")
        except DataError as error:
            problems.append(error.message)
    raise_all(problems, hint="each line must be one JSON object")
    return rows


def _parse_document(path: Path, text: str) -> list[Row]:
    """The rows of a list of JSON objects, of a single one, or of one a line."""
    try:
        document = load_json(text)
    except json.JSONDecodeError as error:
        first = text.strip().split("\n", 1)[0].strip()
        if error.msg == "Extra data" or (first.startswith("{") and first.endswith("}")):
            return _parse_lines(path, text)
        raise DataError(
            f"{path}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}",
            hint="a .json file holds one list of objects",
        ) from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: {unreadable(error)}", hint="flatten or shorten the rows") from None
    items = document if isinstance(document, list) else [document]
    rows: list[Row] = []
    problems: list[str] = []
    for index, item in enumerate(items):
        try:
            rows.append(_as_row(item, f"{path}[{index}]"))
        except DataError as error:
            problems.append(error.message)
    raise_all(problems, hint="each element must be a JSON object")
    return rows


class _KeyTwiceError(ValueError):
    """An object names a key twice: JSON's grammar allows it, and every reader silently keeps the last."""


def load_json(text: str) -> Any:
    """What a JSON text holds; an object that names a key twice is refused with a ValueError."""

    def without_repeats(pairs: list[tuple[str, object]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise _KeyTwiceError(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
        return values

    return json.loads(text, object_pairs_hook=without_repeats)


def unreadable(error: RecursionError | ValueError) -> str:
    """Why text that is JSON by its grammar is refused."""
    if isinstance(error, _KeyTwiceError):
        return f"key {str(error)[:60]!r} is there twice"
    return "JSON nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def _as_row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__} {str(value)[:60]!r}")
    return Row(value, where)


def _parse_table(path: Path, content: bytes) -> list[Row]:
    """The rows below a header line; every cell is text, and an empty one is empty text."""
    csv.field_size_limit(_LONGEST_CELL)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(_decoded(path, content), newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    problems: list[str] = []
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = cells
                _check_names(path, header)
            elif len(cells) != len(header):
                problems.append(f"{where}: {len(cells)} cells, but the header names {len(header)} columns")
            else:
                rows.append(Row(dict(zip(header, cells, strict=True)), where))
    except csv.Error as error:
        problems.append(f"{path}:{start}: broken table: {error}")
    raise_all(problems, hint="quote each cell that holds the delimiter, a quote (doubled) or a line break")
    return rows


def _parse_parquet(path: Path, content: bytes) -> list[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError(
            f"{path}: a Parquet file needs pyarrow, which is not installed",
            hint=f"{install_line('parquet')}, or save the rows as .jsonl",
        ) from None
    try:
        table = parquet.read_table(pyarrow.BufferReader(content), page_checksum_verification=True)
        _check_names(path, table.column_names)
        return [Row(values, f"{path}[{index}]") for index, values in enumerate(table.to_pylist())]
    except (pyarrow.ArrowException, OSError, ValueError, UnicodeDecodeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: broken Parquet file: {first}", hint="write the file again") from None


def _check_names(path: Path, names: list[str]) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    raise_all([f"{path}: column {name[:60]!r} is there twice" for name in twice], hint="give each column its own name")


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


_READERS: dict[str, Callable[[Path, bytes], list[Row]]] = {
    ".jsonl": lambda path, content: _parse_lines(path, _lines(_decoded(path, content))),
    ".json": lambda path, content: _parse_document(path, _lines(_decoded(path, content))),
    ".csv": _parse_table,
    ".tsv": _parse_table,
    ".parquet": _parse_parquet,
}
