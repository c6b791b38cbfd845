"""Reads data files row by row and remembers where each row stood."""

import json
from pathlib import Path
from typing import Any

from finetune.errors import DataError
from finetune.records import Row


def read_rows(path: Path, *, limit: int | None = None) -> list[Row]:
    """Read a `.jsonl` or `.json` file into rows; a `.json` file holds a list of objects, or one object a line.

    Raises:
        DataError: the file is missing, a folder, empty, not UTF-8, not JSON at some line, or holds something other
            than objects. Every broken line is named (the first twenty in full).
    """
    text = _read_text(path)
    rows = _parse_document(path, text) if path.suffix.lower() == ".json" else _parse_lines(path, text)
    if not rows:
        raise DataError(f"{path} holds no rows", hint="put one JSON object on each line")
    return rows if limit is None else rows[:limit]


def _read_text(path: Path) -> str:
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder, not a data file", hint="name the .jsonl or .json file inside it")
        if path.suffix.lower() not in {".json", ".jsonl"}:
            raise DataError(f"{path} ends in {path.suffix or 'nothing'!r}", hint="use a .jsonl or .json file")
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist", hint="check the path (data.train or --data)") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}",
            hint="convert it, for example with: iconv -f latin1 -t utf-8",
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path} cannot be read: {reason}", hint="check the path and its permissions") from None
    if not text.strip():
        raise DataError(f"{path} is empty", hint="put one JSON object on each line")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parse_lines(path: Path, text: str) -> list[Row]:
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            rows.append(_as_row(json.loads(line), where))
        except json.JSONDecodeError as error:
            problems.append(f"{where}: broken JSON at column {error.colno}: {error.msg}")
        except (RecursionError, ValueError) as error:
            problems.append(f"{where}: {_unreadable(error)}")
        except DataError as error:
            problems.append(error.message)
    raise_all(problems, hint="each line must be one JSON object")
    return rows


def _parse_document(path: Path, text: str) -> list[Row]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        first = text.strip().split("\n", 1)[0].strip()
        if error.msg == "Extra data" or (first.startswith("{") and first.endswith("}")):
            return _parse_lines(path, text)
        raise DataError(
            f"{path}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}",
            hint="a .json file holds one list of objects",
        ) from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: {_unreadable(error)}", hint="flatten or shorten the rows") from None
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


def _unreadable(error: RecursionError | ValueError) -> str:
    """Why Python cannot hold what is JSON by its grammar."""
    return "JSON nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def _as_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__} {str(value)[:60]!r}")
    return Row(value, where)


def raise_all(problems: list[str], *, hint: str) -> None:
    """Raise one DataError that names every problem (twenty in full, the rest counted); nothing when there is none."""
    if not problems:
        return
    shown = problems[:20]
    if len(problems) > len(shown):
        shown.append(f"... and {len(problems) - len(shown)} more")
    raise DataError("\n  ".join(["the data cannot be used:", *shown]), hint=hint)
