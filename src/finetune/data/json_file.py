"""Reads rows from JSON: one object a line, or a list of objects."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from finetune.data.problems import raise_all
from finetune.errors import DataError
from finetune.records import Row


def parse_lines(path: Path, text: str) -> list[Row]:
    """The rows of one JSON object a line; empty lines are none.

    Raises:
        DataError: a line is not JSON, no object, or names a key twice; all such lines are named.
    """
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            rows.append(_as_row(_parse(line), where))
        except json.JSONDecodeError as error:
            problems.append(f"{where}: broken JSON at column {error.colno}: {error.msg}")
        except (RecursionError, ValueError) as error:
            problems.append(f"{where}: {_unreadable(error)}")
        except DataError as error:
            problems.append(error.message)
    raise_all(problems, hint="each line must be one JSON object")
    return rows


def parse_document(path: Path, text: str) -> list[Row]:
    """The rows of a list of JSON objects, of a single one, or of one a line.

    Raises:
        DataError: as `parse_lines`.
    """
    try:
        document = _parse(text)
    except json.JSONDecodeError as error:
        first = text.strip().split("\n", 1)[0].strip()
        if error.msg == "Extra data" or (first.startswith("{") and first.endswith("}")):
            return parse_lines(path, text)
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


class _KeyTwiceError(ValueError):
    """An object names a key twice; JSON's grammar lets it, and every reader silently keeps the last."""


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _KeyTwiceError(twice)
    return values


def _unreadable(error: RecursionError | ValueError) -> str:
    """Why we refuse to hold what is JSON by its grammar."""
    if isinstance(error, _KeyTwiceError):
        return f"key {str(error)[:60]!r} is there twice"
    return "JSON nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def _as_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__} {str(value)[:60]!r}")
    return Row(value, where)
