"""Reads rows from tables: CSV and TSV with a header line, and Parquet."""

import csv
import io
from collections import Counter
from pathlib import Path

from finetune.data.problems import raise_all
from finetune.errors import DataError, MissingExtraError
from finetune.records import Row

_LONGEST_CELL = 2**31 - 1
"""The csv module stops at 131,072 characters unless it is told otherwise; a document may be longer."""


def parse_table(path: Path, text: str, *, delimiter: str) -> list[Row]:
    """The rows below a header line; every cell is text, and an empty one is empty text.

    Raises:
        DataError: a name stands twice in the header, a row has more or fewer cells than it, or a quote is not closed.
    """
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
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


def parse_parquet(path: Path, content: bytes) -> list[Row]:
    """The rows of a Parquet file; a null is no value.

    Raises:
        DataError: the file is damaged, or a name stands twice among its columns.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError(
            f"{path}: a Parquet file needs pyarrow, which is not installed",
            hint="pip install 'finetune-suite[parquet]', or save the rows as .jsonl",
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
