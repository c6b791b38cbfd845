"""Laws of the drawn data files: the reader finds in sound ones what they hold, and in damaged ones the damage."""

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.data.read import read_rows
from finetune.data.shape import shape_rows
from finetune.errors import DataError
from finetune.records import Row
from finetune_strategies.damaged_files import (
    BROKEN_LINES,
    DAMAGES,
    MISSHAPES,
    UNUSABLE,
    DamagedFile,
    damaged_files,
    misshapen_files,
)
from finetune_strategies.data_files import BOM, GoodFile, good_files, good_lines, good_lists, good_tables
from finetune_strategies.drawing import drawn, simplest
from finetune_strategies.profiles import examples
from support.conversations import data_file

TRAITS = {
    "lines": 20,
    "list": 10,
    "one object": 1,
    "table": 15,
    "mark": 20,
    "UTF-16": 10,
    "packed": 20,
    "lf": 10,
    "crlf": 8,
    "cr": 4,
    "blank lines": 4,
    "line end in a cell": 6,
    "lone carriage return in a cell": 2,
}
"""What a sound file can be like, and how many of 240 must be."""


def names(message: str, word: str) -> bool:
    """Whether the message holds the word, and not as the beginning of a longer number."""
    return re.search(re.escape(word) + r"(?!\d)", message) is not None


@given(good_lines() | good_lists())
def test_good_json_file_is_read_row_by_row(file: GoodFile) -> None:
    """A sound JSON file holds exactly the rows that were written, each in its place, whatever the file looks like."""
    assert found_in(file) == list(file.rows)


@given(good_tables())
@example(GoodFile(".csv", b'text,b\n"a\rb",c\n', ((":2", {"text": "a\rb", "b": "c"}),), frozenset()))
@example(GoodFile(".tsv", b'text\n"a\r\nb"\nc\n', ((":2", {"text": "a\r\nb"}), (":4", {"text": "c"})), frozenset()))
@examples(2)
def test_good_table_is_read_row_by_row(file: GoodFile) -> None:
    """A sound table holds exactly the cells that were written, each row in its place, line ends in cells and all."""
    assert found_in(file) == list(file.rows)


def found_in(file: GoodFile) -> list[tuple[str, dict[str, Any]]]:
    """Place and values of every row that the reader finds."""
    with data_file(file.content, file.suffix) as path:
        return [(row.where.replace(str(path), ""), row.values) for row in read_rows(path)]


@given(damaged_files() | misshapen_files())
@example(DamagedFile(".jsonl", b'{"text": "a"}\n{"a": ' + b"9" * 5000 + b"}\n{", (":2", ":3"), (":1",)))
@example(DamagedFile(".jsonl", b'\xef\xbb\xbf{"a": "\xff', ("UTF-8", "offset 10")))
@example(DamagedFile(".json", b'{"text": }\n{"text": "a"}\n{"text" 1}', (":1", ":3"), (":2",)))
@example(DamagedFile(".jsonl", b'{"\\ud800": 1}', (":1",)))
@examples(4)
def test_damaged_file_is_refused_in_every_place(file: DamagedFile) -> None:
    """A damaged file is one DataError that names the file, all that is wrong, nothing that is right, and a remedy."""
    refused_in_every_place(file)


@pytest.mark.parametrize("damage", BROKEN_LINES)
def test_line_of_every_damage_is_refused_in_its_place(damage: str) -> None:
    """Each line of each of 7 damages, alone between two good ones, is what the one error names."""
    for line in BROKEN_LINES[damage]:
        content = f'{{"text": "a"}}\n{line}\n{{"text": "b"}}\n'.encode()
        refused_in_every_place(DamagedFile(".jsonl", content, (":2",), (":1", ":3"), damage))


def refused_in_every_place(file: DamagedFile) -> None:
    """The law of damaged files, for one of them."""
    with data_file(file.content, file.suffix) as path:
        with pytest.raises(DataError) as caught:
            shape_rows(read_rows(path))
        assert str(path) in str(caught.value)
        message = str(caught.value).replace(str(path), "")
        assert [word for word in file.named if not names(message, word)] == [], message
        assert [word for word in file.unnamed if names(message, word)] == [], message
        assert caught.value.hint
        assert len(message.encode()) < 8_000
        assert path.read_bytes() == file.content
        assert [found.name for found in path.parent.iterdir()] == [path.name]


@given(st.lists(st.sampled_from([0, *range(-1, len(UNUSABLE))]), min_size=1, max_size=7))
@examples(2)
def test_unusable_row_costs_itself(picks: list[int]) -> None:
    """Rows that cannot be used are left out and counted with a reason and a place; more than half refuse the file."""
    rows = [UNUSABLE[pick] if pick >= 0 else {"text": "a"} for pick in picks]
    bad = sum(pick >= 0 for pick in picks)
    given_rows = [Row(row, f"a:{number}") for number, row in enumerate(rows)]
    if 2 * bad > len(rows):
        with pytest.raises(DataError) as caught:
            shape_rows(given_rows)
        assert caught.value.hint
        first = next(number for number, pick in enumerate(picks) if pick >= 0)
        assert names(caught.value.message, f"a:{first}")
        return
    shaped = shape_rows(given_rows)
    assert (len(shaped.examples), sum(shaped.dropped.values())) == (len(rows) - bad, bad)
    assert shaped.dropped.keys() == shaped.dropped_at.keys()


@given(misshapen_files())
def test_equal_faults_are_one_line_with_a_count(file: DamagedFile) -> None:
    """Rows with the same fault are one line: three places, and how many more; all rows with one are counted."""
    with data_file(file.content, file.suffix) as path, pytest.raises(DataError) as caught:
        shape_rows(read_rows(path))
    heads, faults = zip(*(line.split(": ", 1) for line in caught.value.message.splitlines()[1:]), strict=True)
    assert len(set(faults)) == len(faults) <= 20
    places = [head.replace(str(path), "").partition(" and ") for head in heads]
    assert all(1 <= named.count(":") <= 3 for named, _, _ in places)
    assert sum(named.count(":") + int(more.split()[0] if more else 0) for named, _, more in places) == file.wrong


@pytest.mark.tools
def test_damaged_files_show_every_damage() -> None:
    """Each of these damages and 4 wrong shapes comes up among 480 and 120 files, at any place up to the twentieth."""
    assert (len(DAMAGES), len(MISSHAPES)) == (24, 4)
    damaged, misshapen = drawn(damaged_files(), share=20), drawn(misshapen_files())
    assert {file.damage for file in damaged} == set(DAMAGES)
    assert {file.damage for file in misshapen} == set(MISSHAPES)
    assert sum(bool(file.unnamed) for file in damaged) > 100
    places = [int(word[1:]) for file in (*damaged, *misshapen) for word in file.named if re.fullmatch(r":\d+", word)]
    assert len(places) > 300
    assert set(places) >= set(range(1, 16))


@pytest.mark.tools
def test_good_files_show_every_trait() -> None:
    """Each of these traits is that of at least the stated number of 240 files, and a mark is what it says."""
    files = drawn(good_files(), share=10)
    counts = Counter(trait for file in files for trait in file.traits)
    assert set(counts) == set(TRAITS)
    assert {trait: count for trait, count in counts.items() if count < TRAITS[trait]} == {}
    plain = [file for file in files if "packed" not in file.traits]
    assert all(file.content.startswith(BOM) == ("mark" in file.traits) for file in plain)
    kinds = {file.suffix if "packed" not in file.traits else file.suffix[: file.suffix.rindex(".")] for file in files}
    assert kinds == {".jsonl", ".json", ".JSONL", ".ndjson", ".csv", ".tsv"}


SMALLEST: dict[str, tuple[st.SearchStrategy[Any], str, int]] = {
    "ragged table": (damaged_files(), "ragged table", 30),
    "cut off line": (damaged_files(), "cut off line", 1),
    "not an object in a list": (damaged_files(), "not an object in a list", 6),
    "missing column": (misshapen_files(), "missing column", 2),
}


@pytest.mark.tools
@pytest.mark.parametrize("damage", SMALLEST)
def test_damaged_file_of_a_failure_is_small(damage: str) -> None:
    """The file that a failure is reported with holds the damage and hardly anything else."""
    files, wanted, most = SMALLEST[damage]
    file = simplest(files, lambda found: found.damage == wanted)
    assert len(file.content) <= most, file.content
