"""The page of faults is true to the suite: every law that it names exists, and its numbers are those of its rows."""

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "faults.md"
SECTIONS = 9
ROWS = 115
BACKENDS_PAGE = ROOT / "docs" / "backends.md"
NONE = "–"
"""Stands where a law or a fault has nothing to be about; the page says why."""


@dataclass(frozen=True)
class Listed:
    """A row of the page: a fault, and what kills it."""

    id: str
    name: str
    words: str
    kills: str

    @property
    def cannot_exist(self) -> bool:
        """Whether it is said why this fault cannot exist."""
        return self.kills.startswith("cannot exist: ")

    @property
    def tier(self) -> int:
        """The tier whose laws kill it; 0 when it cannot exist."""
        return 0 if self.cannot_exist else 2 if self.kills.startswith("Tier 2: ") else 1

    @property
    def laws(self) -> list[tuple[str, str]]:
        """File and name of each law."""
        return re.findall(r"`(test_\w+\.py)::(\w+)`", self.kills)


def listed(text: str) -> list[Listed]:
    """The rows of every table of the page."""
    found = re.findall(r"^\| (A\d{3}) `([\w.]+)`(?: \(.*?\))? \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    return [Listed(*row) for row in found]


@cache
def laws_of(folder: str, file: str) -> frozenset[str]:
    """The names of the tests that a file defines: functions, and state machines that are given a name."""
    tree = ast.parse((ROOT / "tests" / folder / file).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    machines = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute) and node.value.attr == "TestCase"
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return frozenset(name for name in functions | machines if name.startswith("test_"))


def missing_laws(rows: list[Listed]) -> list[str]:
    """What the rows name that does not exist where they say, or name nothing at all."""
    problems = []
    for row in rows:
        folder = "scenarios" if row.tier == 2 else "properties"
        if bool(row.laws) == row.cannot_exist:
            problems.append(f"{row.id}: a law or a reason, and not both")
        for file, law in row.laws:
            there = (ROOT / "tests" / folder / file).is_file() and law in laws_of(folder, file)
            problems += [] if there else [f"{row.id}: tests/{folder}/{file}::{law} does not exist"]
    return problems


@pytest.fixture(scope="module")
def rows() -> list[Listed]:
    """The rows of the page."""
    return listed(PAGE.read_text(encoding="utf-8"))


def test_faults_are_all_listed_once(rows: list[Listed]) -> None:
    """There are 115 rows in 9 sections, each with a fault of its own, in order, and with words of its own."""
    text = PAGE.read_text(encoding="utf-8")
    assert len(re.findall(r"^## \d\. ", text, re.MULTILINE)) == SECTIONS
    assert len(rows) == ROWS == len(re.findall(r"^\| A", text, re.MULTILINE))
    assert [row.id for row in rows] == sorted({row.id for row in rows})
    assert len({row.name for row in rows}) == len({row.words for row in rows}) == ROWS


def test_faults_name_laws_that_exist(rows: list[Listed]) -> None:
    """Every law that a row names is a test of the file it is said to be in; at least 60 different ones are named."""
    assert len({law for row in rows for law in row.laws}) >= 60
    assert missing_laws(rows) == []


def test_faults_that_are_counted_are_those_of_the_rows(rows: list[Listed]) -> None:
    """The five numbers above the tables are counted from them."""
    head = PAGE.read_text(encoding="utf-8").split("\n## ")[0]
    told = [int(number) for number in re.findall(r"\*\*(\d+)\*\*", head)]
    tiers = [row.tier for row in rows]
    assert told == [len(rows), tiers.count(0), len(rows) - tiers.count(0), tiers.count(1), tiers.count(2)]


def cells(text: str, heading: str) -> list[list[str]]:
    """The rows of the table under a heading, without its head."""
    part = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def unknown_laws(cell: str) -> list[str]:
    """The laws of a cell that do not exist; a cell that names none is unknown as a whole, unless it says so."""
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", cell)
    if not named:
        return [] if cell == NONE else [cell]
    folders = ("properties", "scenarios")
    there = [
        any((ROOT / "tests" / folder / file).is_file() and law in laws_of(folder, file) for folder in folders)
        for file, law in named
    ]
    return [f"{file}::{law}" for (file, law), found in zip(named, there, strict=True) if not found]


def test_laws_of_backends_exist_where_they_are_said_to(rows: list[Listed]) -> None:
    """The page of backends names 16 laws, each with a test for both frameworks, and faults that are listed, by test."""
    text = BACKENDS_PAGE.read_text(encoding="utf-8")
    laws, faults = cells(text, "Laws"), cells(text, "Faults")
    assert len({row[0] for row in laws}) == len(laws) == 16
    assert all(NONE not in row[1:3] for row in laws)
    ids = [row[0].split()[0] for row in faults]
    assert ids == sorted(set(ids))
    assert len(ids) >= 30
    assert set(ids) <= {row.id for row in rows if not row.cannot_exist}
    assert [law for row in laws + faults for cell in row[1:] for law in unknown_laws(cell)] == []
    assert unknown_laws("`test_faults_listed.py::test_nobody`") == ["test_faults_listed.py::test_nobody"]
    assert unknown_laws("somebody") == ["somebody"]


WRONG = {
    "no such file": "`test_nowhere.py::test_split_never_cuts_a_conversation`",
    "no such law": "`test_tokens_fit.py::test_split_never_cuts`",
    "no test": "`test_tokens_fit.py::encoded`",
    "a law of the other tier": "Tier 2: `test_tokens_fit.py::test_split_never_cuts_a_conversation`",
    "nothing": "somebody will notice",
    "a reason and a law": "cannot exist: see `test_tokens_fit.py::test_split_never_cuts_a_conversation`",
}


@pytest.mark.parametrize("case", WRONG)
def test_faults_whose_law_does_not_exist_are_found(case: str) -> None:
    """Each of 6 ways to name no law is found; a row that names one is not."""
    assert len(WRONG) == 6
    good = "| A105 `pack.x` (TRL #1) | words | `test_tokens_fit.py::test_split_never_cuts_a_conversation` |"
    assert len(listed(good)) == 1
    assert missing_laws(listed(good)) == []
    [row] = listed(f"| A105 `pack.x` | words | {WRONG[case]} |")
    assert missing_laws([row])[0].startswith("A105: ")
