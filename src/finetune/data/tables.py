"""Reads tables row by row: CSV and TSV as text, Parquet and Arrow by pyarrow."""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from finetune.data.unpack import LONGEST_ROW, MOST_TIMES, MOST_UNPACKED, ROW_IN_MEMORY, open_data, text_lines
from finetune.errors import DataError, FileProblems, MissingExtraError, install_line, raise_all
from finetune.records import Row

_DELIMITERS = ";\t|"
_ROWS_AT_ONCE = 64
"""So few that a column of one long value, which takes next to nothing in a file, cannot fill the memory."""


def table_rows(path: Path) -> Iterator[Row]:
    """The rows below the header line of a `.csv` or `.tsv` file; every cell is text, and an empty one is empty text.

    Raises:
        DataError: it cannot be read, or some row has another number of cells; all such are named.
    """
    csv.field_size_limit(LONGEST_ROW)
    lines = (line for _, line in text_lines(path))
    lead: list[str] = []
    for line in lines:
        lead.append(line)
        if line.strip():
            break
    tabbed = path.suffixes[-1:] == [".tsv"] or ".tsv" in path.name.lower()
    delimiter = "\t" if tabbed else _delimiter(lead[-1] if lead else "")
    reader = csv.reader(chain(lead, lines), delimiter=delimiter, strict=True)
    problems = FileProblems("quote each cell that holds the delimiter, a quote (doubled) or a line break")
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
                yield Row(dict(zip(header, cells, strict=True)), where)
    except csv.Error as error:
        problems.append(f"{path}:{start}: broken table: {error}")
    problems.raise_all()
    if not header:
        raise DataError(f"{path} is empty", hint="put one row on each line")


def _delimiter(header: str) -> str:
    """A comma, or else what alone divides a header that has none into several names."""

    def divides(delimiter: str) -> bool:
        try:
            names = next(csv.reader([header], delimiter=delimiter, strict=True), [])
        except csv.Error:
            return False
        return len(names) > 1 and all(name.strip() for name in names)

    found = [delimiter for delimiter in _DELIMITERS if divides(delimiter)]
    return found[0] if len(found) == 1 and not divides(",") else ","


def _check_names(path: Path, names: Iterable[str]) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    raise_all([f"{path}: column {name[:60]!r} is there twice" for name in twice], hint="give each column its own name")


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file.

    Raises:
        DataError: it is damaged, or unpacks to more than `MOST_UNPACKED` bytes and a hundred times its size.
        MissingExtraError: pyarrow is not installed.
    """
    pyarrow = _pyarrow(path, "Parquet")
    from pyarrow import parquet

    with open_data(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            table = parquet.ParquetFile(file, page_checksum_verification=True)
            _check_names(path, table.schema_arrow.names)
            told = table.metadata
            unpacked = sum(told.row_group(at).total_byte_size for at in range(told.num_row_groups))
            _refuse_much(path, size, unpacked + ROW_IN_MEMORY * told.num_rows)
            yield from _batched(path, size, table.iter_batches(_ROWS_AT_ONCE, use_threads=False))
        except (pyarrow.ArrowException, OSError, ValueError, UnicodeDecodeError, OverflowError) as error:
            raise _broken(path, "Parquet", error) from None


def arrow_rows(path: Path) -> Iterator[Row]:
    """The rows of an Arrow file or stream, as `datasets` saves them.

    Raises:
        DataError: it is damaged, or unpacks to more than `MOST_UNPACKED` bytes and a hundred times its size.
        MissingExtraError: pyarrow is not installed.
    """
    pyarrow = _pyarrow(path, "Arrow")
    from pyarrow import ipc

    with open_data(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            table: Any = ipc.open_file(file) if is_file else ipc.open_stream(file)
            _check_names(path, table.schema.names)
            whole = (table.get_batch(at) for at in range(table.num_record_batches)) if is_file else table
            parts = (
                batch.slice(at, _ROWS_AT_ONCE) for batch in whole for at in range(0, batch.num_rows, _ROWS_AT_ONCE)
            )
            yield from _batched(path, size, parts)
        except (pyarrow.ArrowException, OSError, ValueError, UnicodeDecodeError, OverflowError) as error:
            raise _broken(path, "Arrow", error) from None


def _batched(path: Path, size: int, batches: Iterable[Any]) -> Iterator[Row]:
    index = unpacked = 0
    for batch in batches:
        if batch.nbytes > LONGEST_ROW:
            long = [at for at in range(batch.num_rows) if batch.slice(at, 1).nbytes > LONGEST_ROW]
            if long:
                raise DataError(
                    f"{path}[{index + long[0]}]: longer than {LONGEST_ROW:,} bytes, which is no row",
                    hint="split it into several rows, or leave it out",
                )
        unpacked += batch.nbytes + ROW_IN_MEMORY * batch.num_rows
        _refuse_much(path, size, unpacked)
        for values in batch.to_pylist():
            yield Row(values, f"{path}[{index}]")
            index += 1


def _refuse_much(path: Path, size: int, unpacked: int) -> None:
    if unpacked > max(MOST_UNPACKED, MOST_TIMES * size):
        raise DataError(
            f"{path}: {size:,} bytes unpack to rows of over {MOST_UNPACKED:,} bytes, over {MOST_TIMES} times as much: "
            "rows do not shrink so far",
            hint="if it is meant, save the rows as .jsonl",
        )


def _pyarrow(path: Path, kind: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise MissingExtraError(
            f"{path}: a file of {kind} needs pyarrow, which is not installed",
            hint=f"{install_line('parquet')}, or save the rows as .jsonl",
        ) from None
    return pyarrow


def _broken(path: Path, kind: str, error: Exception) -> DataError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataError(f"{path}: broken {kind} file: {first}", hint="write the file again")
