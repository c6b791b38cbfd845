"""Laws of what `ft verify` hands on: SARIF that code scanning takes, summaries without markup, severities."""

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console

from finetune.errors import UsageError
from finetune.records import Outcome
from finetune.verify import formats
from finetune.verify.catalogue import catalogue
from finetune.verify.check import LawFailure, check_same, told_apart
from finetune.verify.findings import as_document, tell_report
from finetune.verify.judge import Effort
from finetune.verify.known import read_known
from finetune.verify.results import SEVERITIES, LawResult, severity_of
from finetune.verify.run import BAD, Verification
from finetune.verify.subjects.choose import BACKENDS, PEERS, subject_file
from finetune.verify.terminal import counted_outcomes, tell_verification
from finetune_strategies.profiles import examples

pytestmark = pytest.mark.tools

WORDS = st.text(max_size=2000) | st.lists(st.sampled_from(["a", "\ud800", "\udfff"])).map("".join)
"""Halves of letters among them."""
RESULTS = st.builds(
    LawResult,
    law=st.sampled_from([*catalogue(), "protocol.alike", "test.law"]),
    statement=st.text(min_size=1, max_size=1500),
    outcome=st.sampled_from(list(Outcome)),
    why=WORDS,
    expected=WORDS,
    got=WORDS,
    case=st.none() | st.dictionaries(st.text(), st.text()),
)
FOUND = st.builds(
    Verification,
    subject=st.text(),
    versions=st.just({"somebody": "1.0"}),
    tier=st.sampled_from([1, 2]),
    effort=st.builds(Effort),
    results=st.lists(RESULTS, max_size=6, unique_by=lambda each: each.law).map(tuple),
    seconds=st.just(1.0),
    trespasses=st.lists(st.text(), max_size=2).map(tuple),
)


def refusals(document: dict[str, Any]) -> list[str]:
    """Why GitHub would refuse a SARIF file, by the rules that it documents ("SARIF support for code scanning")."""
    [run], wrong = document["runs"], []
    rules = run["tool"]["driver"]["rules"]
    wrong += [] if document["version"] == "2.1.0" and run["tool"]["driver"]["name"] else ["version and name"]
    for rule in rules:
        for key in ("shortDescription", "fullDescription", "help"):
            if not 0 < len(rule[key]["text"]) <= (1024 if key != "help" else 10_000):
                wrong.append(f"{rule['id']}: {key}")
    for result in run["results"]:
        places = [each.get("physicalLocation", {}) for each in result.get("locations", ())]
        if not 1 <= len(places) <= 10 or not all(each.get("artifactLocation", {}).get("uri") for each in places):
            wrong.append("expected a physical location")
        if not all(each.get("region", {}).get("startLine", 0) >= 1 for each in places):
            wrong.append("expected a line")
        if not result.get("partialFingerprints", {}).get("primaryLocationLineHash"):
            wrong.append("expected a fingerprint")
        if result["level"] not in ("error", "warning", "note") or not result["message"]["text"]:
            wrong.append("level and message")
        if result["ruleId"] not in [rule["id"] for rule in rules]:
            wrong.append("a rule of its own")
    return wrong


@given(FOUND)
@examples(2)
def test_sarif_is_what_code_scanning_takes(found: Verification) -> None:
    """Every result of any verification has a physical location, a line and a fingerprint that no other result has."""
    document = formats.sarif(found, "0.1.0", "src/mine.py")
    assert refusals(document) == []
    results = document["runs"][0]["results"]
    assert len(results) == sum(each.outcome in BAD for each in found.results)
    assert len({each["partialFingerprints"]["primaryLocationLineHash"] for each in results}) == len(results)
    assert json.loads(as_document(document).encode()) == document
    assert [each["level"] for each in results if each["ruleId"] == "config.unknown"] in ([], ["warning"])


def test_fingerprint_is_the_same_as_yesterday() -> None:
    """A fingerprint is of the subject and the law, not of the case that chance made smallest."""
    told = [
        formats.sarif(
            Verification("mine", {}, 1, Effort(seed), (LawResult("mask.fits", "So.", Outcome.FAILED, got=got),), seed),
            "0.1.0",
            "mine.py",
        )["runs"][0]["results"][0]["partialFingerprints"]
        for seed, got in ((0, "1"), (7, "2"))
    ]
    assert told[0] == told[1]


def test_subject_is_a_file_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class is its module's file, a command its TOML file, one of ours the program that answers for it; relative."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()
    for name in ("src/my_trainer", "a b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "src" / "my_trainer" / "subject.py").write_text("class Mine: ...\n")
    (tmp_path / "a b" / "mine.toml").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "src")
    __import__("my_trainer.subject")
    assert subject_file("my_trainer.subject:Mine") == "src/my_trainer/subject.py"
    assert subject_file("a b/mine.toml") == "a%20b/mine.toml"
    assert subject_file("not_there.at_all:Mine") == "not_there/at_all.py"
    monkeypatch.chdir(tmp_path / "a b")
    assert subject_file("mine.toml") == "a%20b/mine.toml"
    for name in (*BACKENDS, *PEERS):
        place = subject_file(name)
        assert re.fullmatch(r"[\w/.%-]+", place)
        assert not place.startswith("/")
        assert unquote(place).endswith(".py")


@given(FOUND)
@examples(2)
def test_summary_holds_no_markup_of_a_trainer(found: Verification) -> None:
    """A table has a row for each law that does not hold, whatever a trainer says."""
    told = formats.markdown(found)
    rows = [line for line in told.splitlines() if line.startswith("| `")]
    assert len(rows) == sum(each.outcome in BAD for each in found.results)
    assert all(row.count("|") == 5 for row in rows)
    ours = told.replace("<br>", "")
    assert not re.search(r"[<>\[\]*]", ours)
    told.encode()


def test_every_law_has_a_severity() -> None:
    """Each law's cost of failing is chosen, none is by default, and each of the four is some law's."""
    names = [name for group in SEVERITIES.values() for name in group]
    assert len(names) == len(set(names))
    laws = catalogue()
    assert [id for id in laws if id not in names and id.partition(".")[0] not in names] == []
    subjects = {id.partition(".")[0] for id in laws} | {"protocol"}
    assert {name for name in names if name not in laws and name not in subjects} <= {"protocol.inside"}
    found = {severity: [id for id in laws if severity_of(id) == severity] for severity in SEVERITIES}
    assert all(len(ids) >= 5 for ids in found.values()), found
    assert (severity_of("resume.damaged"), severity_of("loss.oracle")) == ("data loss", "wrong learning")


VALUES = st.recursive(
    st.integers(-3, 3) | st.text("ab", max_size=300) | st.none() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=60) | st.dictionaries(st.text("xyz", max_size=2), inner, max_size=5),
    max_leaves=200,
)


@st.composite
def neighbours(draw: st.DrawFn) -> tuple[Any, Any]:
    """Two long values of which one place differs, wherever it is."""
    ids = draw(st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=80), min_size=8, max_size=12))
    row = draw(st.integers(0, len(ids) - 1))
    column = draw(st.integers(0, len(ids[row]) - 1))
    other = [list(each) for each in ids]
    other[row][column] += draw(st.integers(1, 9))
    return ids, other


@st.composite
def texts(draw: st.DrawFn) -> tuple[str, str]:
    """Two long texts of which one letter differs."""
    text = draw(st.text("ab", min_size=1)) * draw(st.integers(1, 2000))
    place = draw(st.integers(0, len(text) - 1))
    return text, f"{text[:place]}c{text[place + 1 :]}"


@given(st.tuples(VALUES, VALUES) | neighbours() | texts())
@examples(2)
def test_what_differs_is_told_apart(pair: tuple[Any, Any]) -> None:
    """Two values that differ, however long and wherever, are never told by the same words, nor by many of them."""
    expected, got = pair
    assume(expected != got)
    with pytest.raises(LawFailure) as caught:
        check_same(expected, got)
    assert caught.value.expected != caught.value.got
    assert max(len(caught.value.expected), len(caught.value.got)) <= 700


@given(neighbours())
@examples(2)
def test_one_number_that_differs_is_all_that_is_told(pair: tuple[Any, Any]) -> None:
    """Of long lists of ids the place is told and both numbers, instead of two dumps that look alike."""
    expected, got = told_apart(*pair)
    if len(str(pair[0])) > 160:
        [place, number], [same, other] = expected.split(": "), got.split(": ")
        row, column = map(int, re.findall(r"\d+", place))
        assert place == same
        assert (int(number), int(other)) == (pair[0][row][column], pair[1][row][column])


def printed(found: Verification, *, verbose: bool = False) -> str:
    """What a terminal shows that is wide enough."""
    console = Console(file=io.StringIO(), width=4000)
    tell_verification(found, console, verbose=verbose)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@given(FOUND)
@examples(2)
def test_only_what_does_not_hold_is_shown(found: Verification) -> None:
    """A law that holds or is skipped is counted and not named; with -v each law is; the counts add up."""
    told = printed(dataclasses.replace(found, subject="somebody"))
    bad = {each.law for each in found.results if each.outcome in BAD}
    for law in (each.law for each in found.results):
        assert (f" {law} ({severity_of(law)}): " in told) == (law in bad)
    words = r"(\d+) (?:passed|failed|error|inconclusive|skipped)"
    assert sum(map(int, re.findall(words, counted_outcomes(found)))) == len(found.results)
    assert {each.law for each in found.results} <= set(re.findall(r"[\w.]+", printed(found, verbose=True)))


def test_skipped_laws_say_what_was_missing() -> None:
    """Laws that are skipped are counted by the ability that was missing."""
    laws = [("loss.oracle", "loss: it has none"), ("padding.same_loss", "loss: it has none"), ("mask.fits", "no case")]
    results = tuple(LawResult(id, "So.", Outcome.NOT_APPLICABLE, why=why) for id, why in laws)
    found = Verification("mine", {}, 1, Effort(), (*results, LawResult("safety.code", "So.", Outcome.FAILED)), 1.0)
    assert counted_outcomes(found) == "1 failed (1 unsafe), 3 skipped (no `loss`: 2, no case that it takes: 1)"


@given(FOUND, st.data())
@examples(2)
def test_baseline_fails_what_is_new_and_nothing_else(found: Verification, data: st.DataObject) -> None:
    """What failed alike before fails nothing, what is new or fails in another way does, and what holds now is told."""
    written = json.loads(as_document(found.as_dict()))
    before = {each["law"]: each["outcome"] for each in written["laws"] if each["outcome"] in BAD}
    held = found.held_to(before)
    assert set(held.known) == set(before)
    judged = any(each.outcome == Outcome.PASSED and not each.law.startswith("protocol.") for each in found.results)
    assert held.passes == (judged and not found.trespasses)
    if before:
        law = data.draw(st.sampled_from(sorted(before)))
        assert not found.held_to({key: value for key, value in before.items() if key != law}).passes
        other = next(outcome for outcome in BAD if outcome != before[law])
        assert not found.held_to({**before, law: other}).passes
    holds = [each.law for each in found.results if each.outcome == Outcome.PASSED]
    assert found.held_to(dict.fromkeys(holds, Outcome.FAILED)).gone == tuple(holds)


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", '{"format": "x"}', '{"format": "finetune verification", "version": 1}', "[" * 100_000),
        '{"format": "finetune verification", "version": 2, "laws": [{"law": 1}]}',
    ],
    ids=["cut", "a list", "another", "older", "deep", "no outcomes"],
)
def test_file_that_is_no_baseline_is_refused(text: str, tmp_path: Path) -> None:
    """A file that no verification wrote is refused by its name, with how to make one."""
    file = tmp_path / "known.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"known\.json is") as caught:
        read_known(file)
    assert "--json" in caught.value.hint


@given(FOUND)
@examples(2)
def test_whatever_a_trainer_says_can_be_written(found: Verification) -> None:
    """Every document, report and line is text that a file and a terminal take, halves of letters among them."""
    document = as_document(found.as_dict())
    assert json.loads(document.encode()) == json.loads(json.dumps(found.as_dict()))
    as_document(formats.sarif(found, "0.1.0", "mine.py")).encode()
    for told in (formats.junit(found), formats.markdown(found), printed(found)):
        told.encode()
    for each in found.results:
        tell_report(found, each, "ft replay it.json").encode()
