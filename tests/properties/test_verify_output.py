"""Laws of what `ft verify` hands on: SARIF that code scanning takes, summaries without markup, severities."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.records import Outcome
from finetune.verify import formats
from finetune.verify.catalogue import catalogue
from finetune.verify.findings import as_document
from finetune.verify.judge import Effort
from finetune.verify.results import SEVERITIES, LawResult, severity_of
from finetune.verify.run import Verification
from finetune.verify.subjects.choose import BACKENDS, PEERS, subject_file
from finetune_strategies.profiles import examples

pytestmark = pytest.mark.tools

WORDS = st.text(max_size=2000)
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
    assert len(results) == sum(each.outcome in formats.BAD for each in found.results)
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
    assert len(rows) == sum(each.outcome in formats.BAD for each in found.results)
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
