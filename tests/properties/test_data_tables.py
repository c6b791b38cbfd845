"""Laws of CSV, TSV and Parquet: the same rows in any file are the same examples, and damage is named in its place."""

import csv
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from finetune.data.read import read_rows
from finetune.data.shape import shape_rows
from finetune.errors import DataError, FineTuneError, MissingExtraError
from finetune.records import Row
from finetune_strategies.conversations import RowCase, rows, texts
from finetune_strategies.profiles import examples
from support.conversations import data_file, said_by

pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'finetune-suite[parquet]'")

COLUMNS = ["instruction", "input", "output", "note,1", ""]


def tables() -> st.SearchStrategy[list[dict[str, str]]]:
    """Rows of text cells of every kind under awkward column names."""
    cell = texts() | st.sampled_from(["", ",", '"', '""', "a\r\nb", "a\nb", "\t", " x ", "\ufeff", "None", "1e5", "\0"])
    return st.lists(st.fixed_dictionaries(dict.fromkeys(COLUMNS, cell)), min_size=1, max_size=5)


def as_csv(table: list[dict[str, str]], *, delimiter: str = ",", newline: str = "\n", mark: str = "") -> bytes:
    """The table as the standard library writes it."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, COLUMNS, delimiter=delimiter, lineterminator=newline, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(table)
    return (mark + file.getvalue()).encode()


def as_parquet(table: list[dict[str, Any]]) -> bytes:
    """The table as pyarrow writes it."""
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(table), file)
    return file.getvalue()


@given(
    tables(),
    st.sampled_from([(",", ".csv"), ("\t", ".tsv"), (",", ".CSV")]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["", "\ufeff"]),
)
def test_table_cells_are_read_as_they_were_written(
    table: list[dict[str, str]], kind: tuple[str, str], newline: str, mark: str
) -> None:
    """Delimiters, quotes, line breaks, white space and words like None in a cell come back as they are."""
    delimiter, suffix = kind
    with data_file(as_csv(table, delimiter=delimiter, newline=newline, mark=mark), suffix) as path:
        assert [row.values for row in read_rows(path)] == table
        assert [row.values for row in read_rows(path, limit=2)] == table[:2]


def test_table_rows_remember_the_line_they_start_on(tmp_path: Path) -> None:
    """Cells with line breaks and empty lines shift no row's place."""
    path = tmp_path / "rows.csv"
    path.write_bytes(b'text,b\n"one\ntwo",1\n\n\nthree,2\r\n"four\r\nfive\r\n",3\nsix,4\n')
    assert [row.where for row in read_rows(path)] == [f"{path}:{line}" for line in (2, 6, 7, 10)]


def test_table_long_cell_is_whole(tmp_path: Path) -> None:
    """A document of some hundred thousand characters in a cell is read whole."""
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "a" * 200_000 + "\n")
    assert read_rows(path) == [Row({"text": "a" * 200_000}, f"{path}:2")]


DAMAGED = {
    b"text,text\na,b\n": ("'text' is there twice",),
    b"text,note\na\nb,c,d\ne,f\n": (":2: 1 cells", ":3: 3 cells", "2 columns"),
    b'text\n"open\n': (":2: broken table", "unexpected end"),
    b'text\n"a"b\n': (":2: broken table",),
    b"text\n\xff\n": ("not UTF-8", "0xff", "offset 5"),
    b"text\n": ("no rows",),
    b"\n\n": ("empty",),
    b"foo,bar\n1,2\n": (":2: no known shape", "bar, foo"),
    b"instruction\na\n": (":2: alpaca row without 'output'",),
    b"messages\nhello\n": (":2: 'messages' is text that is no JSON",),
}


@pytest.mark.parametrize(("content", "named"), DAMAGED.items(), ids=range(len(DAMAGED)))
def test_table_damage_is_named_in_its_place(content: bytes, named: tuple[str, ...], tmp_path: Path) -> None:
    """A damaged table is one DataError that names the file, every place and a remedy; the file stays as it is."""
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        shape_rows(read_rows(path))
    assert all(word in str(caught.value) for word in (str(path), *named)), str(caught.value)
    assert caught.value.hint
    assert path.read_bytes() == content


@given(st.lists(rows(), min_size=1, max_size=5))
def test_parquet_rows_are_those_of_jsonl(cases: list[RowCase]) -> None:
    """Rows of any one shape, nested messages and nulls included, are the same examples from Parquet."""
    same = [case for case in cases if case.shape == cases[0].shape and case.values.keys() == cases[0].values.keys()]
    try:
        content = as_parquet([case.values for case in same])
    except Exception:  # what pyarrow cannot hold in columns is no Parquet file
        assume(False)
    with data_file(content, ".parquet") as path:
        found = read_rows(path)
        assert [row.where for row in found] == [f"{path}[{number}]" for number in range(len(same))]
        shaped = shape_rows(found)
    assert [said_by(one) for one in shaped.examples] == [said_by(case.example) for case in same if not case.dropped]
    assert sum(shaped.dropped.values()) == sum(bool(case.dropped) for case in same)


def refusal_of(path: Path) -> FineTuneError | None:
    """How the file is refused; None when it is read. Anything else that is raised is a failure."""
    try:
        read_rows(path)
    except FineTuneError as error:
        return error
    return None


@given(st.data())
@examples(1 / 2)
def test_parquet_damage_is_one_clear_error(data: st.DataObject) -> None:
    """A Parquet file that is cut off or changed is read or refused by name; nothing else is ever raised."""
    table = [{"prompt": f"question {number}", "completion": "answer"} for number in range(50)]
    content = bytearray(as_parquet(table))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    broken = bytes(content[: data.draw(st.integers(0, len(content)))]) if data.draw(st.booleans()) else bytes(content)
    with data_file(broken, ".parquet") as path:
        error = refusal_of(path)
        assert error is None or (str(path) in str(error) and error.hint)
        assert path.read_bytes() == broken


def test_parquet_damage_says_what_is_wrong(tmp_path: Path) -> None:
    """What pyarrow finds wrong is told in its first line, with what to do."""
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"rows\.parquet: broken Parquet file: .*[Pp]arquet") as caught:
        read_rows(path)
    assert caught.value.hint == "write the file again"


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pyarrow is missing, the file and the extra to install are named."""
    path = tmp_path / "rows.parquet"
    path.write_bytes(as_parquet([{"text": "a"}]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match="needs pyarrow") as caught:
        read_rows(path)
    assert "finetune-suite[parquet]" in caught.value.hint


TWICE = {
    ".jsonl": (b'{"text": "a"}\n{"text": "b", "text": "c"}\n', ":2: key 'text' is there twice"),
    ".json": (b'[{"text": "a"}, {"text": "b", "text": "c"}]', "key 'text' is there twice"),
}


@pytest.mark.parametrize("suffix", TWICE)
def test_json_key_that_is_there_twice_is_refused(suffix: str, tmp_path: Path) -> None:
    """An object that names a key twice is refused: one of its two values would be lost without a word."""
    content, named = TWICE[suffix]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert named in str(caught.value)
    assert caught.value.hint
