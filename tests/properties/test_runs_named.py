"""Runs as they are named on the command line, and as `ft runs` lists them."""

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.cli.app import run
from finetune.errors import FineTuneError, OutputError
from finetune.run.find import age, find_run

MANIFEST = {
    "format": 2,
    "id": "x",
    "outcome": "passed",
    "started": "2026-11-30T10:00:00+00:00",
    "model": {"name": "reference-llama"},
    "data": {"files": [{"path": "rows.jsonl"}]},
    "losses": {},
    "versions": {},
    "plan": [],
    "verdicts": [],
    "notes": [],
}
NAMES = ("20261130-100000-aa", "20261130-100000-bb", "20261201-090000-cc", "first")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four finished runs, made one a minute, and one that was interrupted after them."""
    monkeypatch.chdir(tmp_path)
    for minute, name in enumerate(NAMES):
        folder = tmp_path / "runs" / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "plan.yaml").touch()
        (folder / "run.json").write_text(json.dumps({**MANIFEST, "id": name}))
        os.utime(folder / "run.json", (minute * 60, minute * 60))
    unfinished = tmp_path / "runs" / "20261202-stopped"
    unfinished.mkdir()
    (unfinished / "plan.yaml").write_text("format: 2\n")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("runs/first", "first"),
        ("runs/first/", "first"),
        ("first", "first"),
        ("fi", "first"),
        ("20261130-100000-b", "20261130-100000-bb"),
        ("20261201", "20261201-090000-cc"),
        ("runs/20261201", "20261201-090000-cc"),
        ("latest", "first"),
        ("runs/first/run.json", "first"),
        ("runs/first/checkpoints", "first"),
        ("20261202", "20261202-stopped"),
    ],
)
def test_run_is_found_by_each_of_its_names(name: str, found: str, home: Path) -> None:
    """A path, a file inside, an id, the beginning of one that no other run has, and `latest` name a run."""
    assert find_run(name).resolve() == home / "runs" / found


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("2026", ("4 runs in runs begin with '2026'", "write more")),
        ("frist", ("run frist does not exist", "did you mean runs/first?")),
        ("lates", ("did you mean latest?",)),
        ("nothing-like-it", ("does not exist", "ft runs")),
        ("", ("holds no run",)),
        ("x" * 300, ("cannot be looked for", "ft runs")),
        ("mine.yaml", ("no file of a run", "ft train mine.yaml")),
        ("rows.jsonl", ("no file of a run", "ft train --data rows.jsonl")),
        ("model", ("no run.json", "ft train --model model")),
        ("lora", ("no run.json", "ft judge --tuned lora")),
    ],
)
def test_run_that_is_not_there_is_refused_with_the_nearest(name: str, told: tuple[str, ...], home: Path) -> None:
    """Who names no run, or two at once, is told in three lines which was meant, and what a path is instead."""
    for file in ("mine.yaml", "rows.jsonl", "model/config.json", "lora/adapter_config.json"):
        (home / file).parent.mkdir(exist_ok=True)
        (home / file).touch()
    with pytest.raises(OutputError) as refused:
        find_run(name)
    assert all(words in str(refused.value) for words in told), str(refused.value)
    assert str(refused.value).count("\n") == 1


@given(name=st.text(max_size=40) | st.sampled_from(["~nobody/x", "\0", "..", "runs", "a/" * 200, "-"]))
def test_run_of_any_name_is_found_or_refused(name: str) -> None:
    """Whatever is typed, there is a folder or an error of ours, and nothing is written."""
    try:
        place = find_run(name)
    except FineTuneError as error:
        place, hint = None, error.hint
    assert place.is_dir() if place else hint


def test_runs_are_listed_newest_first(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`ft runs` tells of each run its id, model, data, verdict and age; what it cannot read is listed as such."""
    assert run(["runs"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["run", "model", "data", "verdict", "age"]
    assert [line.split()[0] for line in shown[2:6]] == list(reversed(NAMES))
    assert shown[2].split()[1:4] == ["reference-llama", "rows.jsonl", "passed"]
    assert "unreadable" in shown[1]
    assert run(["runs", "--json"]) == 0
    told = {each["id"]: each for each in json.loads(capsys.readouterr().out)}
    assert (len(told), told["first"]["outcome"], told["first"]["folder"]) == (5, "passed", "runs/first")
    assert run(["runs", str(home / "none")]) == 3


def test_report_takes_runs_by_any_name(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`ft report` shows the run that `latest`, an id or a file inside it names."""
    for name in ("latest", "first", "runs/first/run.json"):
        assert run(["report", name, "--json"]) == 0
        assert [each["id"] for each in json.loads(capsys.readouterr().out)] == ["first"]
    assert run(["report", NAMES[0], "first", "--json"]) == 0
    assert [each["id"] for each in json.loads(capsys.readouterr().out)] == [NAMES[0], "first"]
    for verb in ("evaluate", "chat", "merge", "compare"):
        assert run([verb, "frist"]) == 3
        assert "did you mean runs/first?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("since", "words"),
    [
        (timedelta(seconds=-3), "now"),
        (timedelta(seconds=59), "now"),
        (timedelta(seconds=60), "1 minute"),
        (timedelta(minutes=119), "1 hour"),
        (timedelta(hours=47), "1 day"),
        (timedelta(days=400), "400 days"),
    ],
)
def test_age_is_told_in_its_largest_unit(since: timedelta, words: str) -> None:
    """An age is never rounded up; what is no date has none."""
    now = datetime(2026, 11, 30, tzinfo=UTC)
    assert age((now - since).isoformat(), now) == words
    assert age("yesterday", now) == ""
    assert age("2026-11-30", now) == ""
