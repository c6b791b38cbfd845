"""Reads data files row by row and remembers where each row stood."""

from collections.abc import Callable
from pathlib import Path

from finetune.data.json_file import parse_document, parse_lines
from finetune.data.table_file import parse_parquet, parse_table
from finetune.errors import DataError
from finetune.records import Row


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


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _table(path: Path, content: bytes) -> list[Row]:
    return parse_table(path, _decoded(path, content), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")


_READERS: dict[str, Callable[[Path, bytes], list[Row]]] = {
    ".jsonl": lambda path, content: parse_lines(path, _lines(_decoded(path, content))),
    ".json": lambda path, content: parse_document(path, _lines(_decoded(path, content))),
    ".csv": _table,
    ".tsv": _table,
    ".parquet": parse_parquet,
}
