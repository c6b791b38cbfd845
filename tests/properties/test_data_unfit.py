"""Laws of data files that are too much: each is one clear error in bounded time and memory, and each remedy works."""

import gzip
import json
import shlex
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from finetune.data import tables, unpack
from finetune.data.read import iter_rows, read_rows
from finetune.errors import DataError

MEGABYTE = 2**20


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of one megabyte, so that the files of these tests stay small."""
    for module in (unpack, tables):
        monkeypatch.setattr(module, "MOST_UNPACKED", MEGABYTE)
        monkeypatch.setattr(module, "LONGEST_ROW", MEGABYTE // 4)


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
