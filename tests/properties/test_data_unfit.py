"""Laws of data files that are too much: each is one clear error in bounded time and memory, and each remedy works."""

import gzip
import json
import shlex
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune import errors
from finetune.data import read, tables, unpack
from finetune.data.read import iter_rows, read_rows
from finetune.errors import DataError
from finetune_strategies.profiles import examples

MEGABYTE = 2**20


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of one megabyte, so that the files of these tests stay small."""
    for module in (unpack, tables):
        monkeypatch.setattr(module, "MOST_UNPACKED", MEGABYTE)
        monkeypatch.setattr(module, "LONGEST_ROW", MEGABYTE // 4)
    monkeypatch.setattr(read, "LONGEST_ROW", MEGABYTE // 4)
    monkeypatch.setattr(unpack, "MOST_FOR_NOTHING", MEGABYTE // 64)


def refusal(path: Path) -> DataError:
    """How a file is refused; less than twenty megabytes are held meanwhile."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            for _ in iter_rows(path):
                pass
        assert tracemalloc.get_traced_memory()[1] < 20 * MEGABYTE
    finally:
        tracemalloc.stop()
    assert str(path) in caught.value.message
    assert caught.value.hint
    return caught.value


@pytest.mark.usefixtures("narrow")
def test_gzip_bomb_is_refused_and_its_remedy_works(tmp_path: Path) -> None:
    """What unpacks to far more than rows do is refused with a line that unpacks it, and then it is read."""
    path = tmp_path / "it's rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 20_000))
    error = refusal(path)
    assert "rows do not shrink so far" in error.message
    subprocess.run(shlex.split(error.hint.partition("comes out: ")[2]), check=True)
    assert len(read_rows(path.with_suffix(""))) == 20_000


PACKED_FOR_NOTHING = {
    "padding": b"\0" * MEGABYTE,
    "members": gzip.compress(b"") * (MEGABYTE // 20),
    "name": b"\x1f\x8b\x08\x08" + b"n" * MEGABYTE,
}


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("kind", PACKED_FOR_NOTHING)
def test_packed_bytes_that_unpack_to_nothing_are_refused(kind: str, tmp_path: Path) -> None:
    """What is packed is read on only while it unpacks to something: padding or empty parts without end are refused."""
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n') + PACKED_FOR_NOTHING[kind])
    assert "on end unpack to nothing" in refusal(path).message
    path.write_bytes(gzip.compress(b'{"text": "a"}\n') + b"\0" * 512 + gzip.compress(b"") * 9)
    if kind != "name":
        assert len(read_rows(path)) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_parquet_bomb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A small Parquet file of millions of rows, or of one long value many times, is refused."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'finetune-suite[parquet]'")
    from pyarrow import parquet

    for name, column in (("many", ["a"] * 300_000), ("long", ["x" * 100_000] * 5_000)):
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.table({"text": column}), path)
        assert "rows do not shrink so far" in refusal(path).message


@pytest.mark.usefixtures("narrow")
def test_long_document_is_refused_and_the_remedy_works(tmp_path: Path) -> None:
    """A long .json that is no list is not read whole; the line that is told writes its rows one a line."""
    rows = [{"prompt": str(number), "completion": "x" * 99} for number in range(2500)]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    tables = {key: {str(at): cell for at, cell in enumerate(cells)} for key, cells in columns.items()}
    for name, document in {"below": {"version": 1, "data": rows}, "columns": columns, "of pandas": tables}.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(document))
        error = refusal(path)
        assert "read whole" in error.message
        command = error.hint.partition("for example with: ")[2].replace("python ", f"{shlex.quote(sys.executable)} ", 1)
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert [row.values for row in read_rows(path.with_suffix(".jsonl"))] == rows


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("text", ["[{}]", "[\n{}\n]", "{}\n"], ids=["one line", "lines", "one a line"])
def test_long_json_is_read_row_by_row(text: str, tmp_path: Path) -> None:
    """However long a .json list, or one of a row a line: no more of it is held than a row and a block."""
    rows = [{"text": f"é{number}" + "x" * 9999} for number in range(1000)]
    between = "\n" if text == "{}\n" else ",\n" if "\n" in text else ", "
    path = tmp_path / "rows.json"
    path.write_text(text.replace("{}", between.join(map(json.dumps, rows))), encoding="utf-8")
    tracemalloc.start()
    found = [row.values == rows[at] for at, row in enumerate(iter_rows(path))]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(found), all(found)) == (1000, True)
    assert most < 8 * MEGABYTE < path.stat().st_size


@pytest.mark.usefixtures("narrow")
def test_list_of_a_billion_empty_rows_in_a_packed_file_is_refused(tmp_path: Path) -> None:
    """What a row takes in memory beside its text counts in a packed list, too."""
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(b"[" + b"{}," * 3_000 + b"{}]"))
    assert "rows do not shrink so far" in refusal(path).message


VALUES = st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=9,
)


@given(
    st.lists(VALUES | st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=5),
    st.sampled_from([None, 1]),
    st.none() | st.tuples(st.floats(0, 1), st.integers(0, 2), st.sampled_from(["", ",", "]", '"', "\n", "7", "\\"])),
    st.integers(1, 40),
)
@examples(1 / 2)
@example([1.5e-7, -3], None, None, 1)
@example([{"a": "\U0001f600"}], None, None, 1)
def test_list_in_blocks_is_the_list_read_whole(
    values: list[object], indent: int | None, damage: tuple[float, int, str] | None, block: int
) -> None:
    """However a list is cut into blocks, its rows, and the place where it is broken, are those of the whole text."""
    text = json.dumps(values, indent=indent)
    if damage:
        at = round(damage[0] * len(text))
        text = text[:at] + damage[2] + text[at + damage[1] :]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(unpack, "BLOCK", block)
        path = Path(folder) / "rows.json"
        path.write_text(text)
        expected, broken = whole_list(text)
        found, said = [], ""
        try:
            found += (row.values for row in iter_rows(path))
        except DataError as error:
            said = error.message
        if broken:
            assert said == f"{path}:{broken}" or "trailing comma" in broken
        elif expected is not None:
            assert found == expected


def whole_list(text: str) -> tuple[list[object] | None, str]:
    """The rows of a text that is a list, and the place where it is broken, both as Python's reader has them."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        said = f"{error.lineno}: broken JSON at column {error.colno}: {error.msg}"
        return None, said if text.lstrip().startswith("[") else ""
    return [each for each in whole if isinstance(each, dict)] if isinstance(whole, list) else None, ""


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt", "rows.csv", "rows.ndjson.gz"])
def test_row_without_an_end_is_refused_in_its_place(name: str, tmp_path: Path) -> None:
    """A row longer than any model reads is refused by its line, and is never held."""
    content = b'{"text": "a"}\n{"text": "' + bytes(range(65, 91)) * (4 * MEGABYTE // 26) + b'"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert f"{name}:2: longer than" in refusal(tmp_path / name).message


def test_sparse_file_of_a_terabyte_is_refused_at_once(tmp_path: Path) -> None:
    """A file of nothing but NULs, however long, is no text and no row."""
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="longer than"):
        read_rows(path)


def test_lists_under_several_keys_are_refused_and_the_remedy_works(tmp_path: Path) -> None:
    """The line that a refusal names takes one list out of the document, which is then read."""
    path = tmp_path / "all of it.json"
    path.write_text(json.dumps({"train": [{"text": "a"}, {"text": "b"}], "test": [{"text": "c"}]}))
    error = refusal(path)
    command = error.hint.partition("for example with: ")[2].replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert [row.values for row in read_rows(tmp_path / "train.jsonl")] == [{"text": "a"}, {"text": "b"}]


def test_latin_1_is_refused_and_the_remedy_works(tmp_path: Path) -> None:
    """The line that converts a file does, and what comes out is read."""
    path = tmp_path / "my rows.jsonl"
    path.write_bytes('{"text": "café"}\n'.encode("latin-1"))
    subprocess.run(refusal(path).hint.partition("for example with: ")[2], shell=True, check=True)
    assert read_rows(tmp_path / "my rows.utf8.jsonl")[0].values == {"text": "café"}


def test_equal_problems_are_one_line_with_a_count(tmp_path: Path) -> None:
    """Lines that are wrong alike are told once, with their places; the rest is counted."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' + "nope\n" * 30)
    lines = refusal(path).message.splitlines()
    assert len(lines) == 3
    assert ":2, :3, " in lines[1]
    assert "(20 rows)" in lines[1]
    assert lines[2].strip() == "... and 10 more"


ENDLESS = {"rows.jsonl": "1\n", "rows.json": "1,", "rows.txt": "aa\0\n", "rows.csv": "a,b,c\n"}


@pytest.mark.parametrize("name", ENDLESS)
def test_file_of_nothing_but_problems_is_read_no_further(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where everything is wrong the first so many are enough: no list of them grows with the file."""
    monkeypatch.setattr(errors, "MOST_PROBLEMS", 200)
    path = tmp_path / name
    head = {"rows.json": "[", "rows.csv": "prompt,completion\n"}.get(name, "")
    path.write_text(head + ENDLESS[name] * 400)
    assert "with 200 of them the rest was not read" in refusal(path).message


DOCUMENTS = {
    '{"prompt": ["a", "b"], "completion": ["c", "d"]}': 2,
    '{"prompt": {"0": "a", "1": "b"}, "completion": {"0": "c", "1": "d"}}': 2,
    '{"meta": 1, "examples": [{"prompt": "a", "completion": "b"}]}': 1,
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}': 1,
    '{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}': 1,
    '{"messages": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]}': 2,
    '{"text": ["a", "b", "c"]}': 3,
}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_json_document_is_rows_columns_or_one_row(document: str, tmp_path: Path) -> None:
    """Columns and lists of rows are told from one row, whose own lists hold messages."""
    path = tmp_path / "rows.json"
    path.write_text(document)
    assert len(read_rows(path)) == DOCUMENTS[document]
