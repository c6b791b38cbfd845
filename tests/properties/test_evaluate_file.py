"""Laws of measuring a run on a file: what was trained on is left out, numbers are true, nothing is harmed."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import finetune
from finetune.cli.app import run as ft
from finetune.errors import DataError, UsageError
from finetune.evidence.evaluate import evaluate
from finetune.evidence.reopen import reopen
from finetune.intervals import mean_interval
from finetune.train import fine_tune
from support.disks import everything_below
from support.workplace import make_model, settings, without_reload_check

WORDS = (
    *("apple", "pear", "plum", "fig", "date", "grape", "lemon", "lime", "melon"),
    *("peach", "cherry", "berry", "olive", "mango", "papaya", "guava", "kiwi", "quince"),
)


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    """Rows of prompts and answers."""
    path.write_text("".join(json.dumps({"prompt": ask, "completion": say}) + "\n" for ask, say in rows))
    return path


def trained_rows() -> list[tuple[str, str]]:
    """Each word with its number."""
    return [(f"number of {word}", str(place)) for place, word in enumerate(WORDS[:9])]


def unseen_rows() -> list[tuple[str, str]]:
    """The same question of other words."""
    return [(f"number of {word}", str(place)) for place, word in enumerate(WORDS[9:], start=9)]


def long_rows(words: Sequence[str]) -> list[tuple[str, str]]:
    """Questions with answers of many wordings."""
    return [(f"tell of {word}", " ".join(f"{word}{other} tells" for other in "abcdefg")) for word in words]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on exact answers, one on open ones, and one of a whole model."""
    place = tmp_path_factory.mktemp("evaluate")
    make_model(place / "model")
    exact = write(place / "rows.jsonl", trained_rows())
    open_ = write(place / "open.jsonl", long_rows(WORDS[:9]))
    how: dict[str, Any] = {"evaluation__max_new_tokens": 6, "training__epochs": 3.0}
    with without_reload_check():
        fine_tune(settings(place / "model", exact, judge__answers="exact", **how), output=place / "exact")
        fine_tune(settings(place / "model", open_, judge__answers="open", **how), output=place / "open")
        whole = {"adapter__kind": "full", "adapter__rank": 8, "judge__answers": "exact"}
        fine_tune(settings(place / "model", exact, **whole, **how), output=place / "whole")
    return place


def by_id(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The measures by their ids."""
    return {each["id"]: each for each in found["measures"]}


@pytest.mark.parametrize("run", ["exact", "whole"])
def test_losses_on_a_file_are_those_of_base_and_tuned_model(place: Path, tmp_path: Path, run: str) -> None:
    """Loss and exact match are what the two models, asked by other means, make of the same rows."""
    found = evaluate(place / run, write(tmp_path / "test.jsonl", unseen_rows()))
    measures = by_id(found)
    assert found["data"]["asked"] == len(unseen_rows())
    assert set(measures) == {"loss", "likelier", "exact"}
    prepared, session = reopen(place / run)
    from finetune.config import load_plan
    from finetune.data.read import read_rows
    from finetune.data.shape import shape_rows
    from finetune.evidence.saved import open_model
    from finetune.records import Batch

    base = open_model(load_plan(place / run / "plan.yaml").config, prepared.location, prepared.encoder)
    rows = prepared.encoder.encode(shape_rows(read_rows(tmp_path / "test.jsonl")), prepared.plan).rows
    targets = sum(row.target_count for row in rows)
    for name, model in (("base", base), ("tuned", session)):
        wanted = sum(model.loss(Batch((row,))) for row in rows) / targets
        assert measures["loss"][name] == pytest.approx(wanted, rel=1e-9)
    loss = measures["loss"]
    low, high = loss["difference_interval"]
    assert low < loss["difference"] < high
    exact = measures["exact"]
    assert exact["count"] == len(unseen_rows())
    for name in ("base", "tuned"):
        low, high = exact[f"{name}_interval"]
        assert 0 <= low <= exact[name] <= high <= 1


def test_open_answers_are_told_apart_from_others(place: Path, tmp_path: Path) -> None:
    """Where answers are open no words are compared: likelihoods are, and a row's own answer with others'."""
    found = evaluate(place / "open", write(tmp_path / "test.jsonl", long_rows(WORDS[9:])))
    measures = by_id(found)
    assert found["answers"] == "open"
    assert set(measures) == {"loss", "likelier", "matching"}
    assert measures["matching"]["count"] > 3
    assert measures["matching"]["outcome"] in ("passed", "failed", "inconclusive")
    low, high = measures["likelier"]["tuned_interval"]
    assert low <= measures["likelier"]["tuned"] <= high


def test_rows_that_were_trained_on_are_left_out_and_told(place: Path, tmp_path: Path) -> None:
    """Whatever is mixed in from training changes no number: it is counted, named, and not asked."""
    clean = evaluate(place / "exact", write(tmp_path / "clean.jsonl", unseen_rows()))
    again = [(ask.upper(), say) for ask, say in trained_rows()[2:4]]
    mixed = evaluate(place / "exact", write(tmp_path / "mixed.jsonl", [*trained_rows()[:3], *unseen_rows(), *again]))
    assert mixed["data"]["asked"] == clean["data"]["asked"]
    assert mixed["measures"] == clean["measures"]
    assert sum(mixed["data"]["overlap"]["alike"].values()) == 5
    [note] = [note for note in mixed["notes"] if "rows trained on" in note]
    assert "mixed.jsonl:1 as " in note
    assert not any("rows trained on" in note for note in clean["notes"])
    with pytest.raises(DataError, match="nothing is left to measure on") as caught:
        evaluate(place / "exact", write(tmp_path / "same.jsonl", trained_rows()))
    assert caught.value.hint


def test_evaluation_is_kept_beside_the_evidence_and_changes_none_of_it(place: Path, tmp_path: Path) -> None:
    """One file more lies below evaluations/, without a path in it; everything else keeps its bytes."""
    run = place / "exact"
    before = {name: each for name, each in everything_below(run).items() if "evaluations" not in str(name)}
    found = evaluate(run, write(tmp_path / "kept.jsonl", unseen_rows()))
    with pytest.raises(DataError):
        evaluate(run, tmp_path / "gone.jsonl")
    with pytest.raises(UsageError):
        evaluate(run, tmp_path / "kept.jsonl", limit=0)
    after = {name: each for name, each in everything_below(run).items() if "evaluations" not in str(name)}
    assert before == after
    text = Path(found.pop("written")).read_text()
    assert json.loads(text) == json.loads(json.dumps(found))
    assert str(tmp_path) not in json.dumps({**found, "notes": []})
    assert evaluate(run, tmp_path / "kept.jsonl")["measures"] == found["measures"]
    assert finetune.evaluate is evaluate


def test_limit_asks_so_many_rows(place: Path, tmp_path: Path) -> None:
    """A limit is held, its rows are spread over the file, and another limit is another file."""
    data = write(tmp_path / "many.jsonl", unseen_rows())
    found = evaluate(place / "exact", data, limit=4)
    assert found["data"]["asked"] == 4
    asked = [answer["expected"] for answer in by_id(found)["exact"]["answers"]]
    assert asked == ["9", "11", "13", "15"]
    assert found["written"] != evaluate(place / "exact", data)["written"]


def test_command_shows_measures_and_refuses_what_it_cannot_read(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ft evaluate RUN --data FILE` prints each measure; bad rows end with exit 2 or 3 and one clear error."""
    data = write(tmp_path / "test.jsonl", unseen_rows())
    assert ft(["evaluate", str(place / "exact"), "--data", str(data)]) == 0
    told = capsys.readouterr()
    assert all(words in told.out for words in ("Loss", "Rows that got", "Answers right"))
    assert "written:" in told.err
    assert ft(["evaluate", str(place / "exact"), "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["asked"] == 9
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": ')
    (tmp_path / "odd.jsonl").write_text('{"colour": "a"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "word " * 900, "completion": "b"}) + "\n")
    before = everything_below(place / "exact")
    for name, words in (
        ("broken.jsonl", "broken.jsonl:2"),
        ("odd.jsonl", "colour"),
        ("long.jsonl", "can be asked"),
        ("gone.jsonl", "does not exist"),
    ):
        assert ft(["evaluate", str(place / "exact"), "--data", str(tmp_path / name)]) in (2, 3)
        said = capsys.readouterr().err
        assert words in said
        assert "Traceback" not in said
    assert ft(["evaluate", str(place / "exact"), "--limit", "3"]) == 2
    assert ft(["evaluate", str(place / "exact"), "--data", str(data), "--limit", "0"]) == 2
    assert everything_below(place / "exact") == before


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.floats(-5, 5))
def test_interval_of_a_mean_moves_with_it(values: list[float], shift: float) -> None:
    """It is around the mean, shifts with the values, and there is none for fewer than four."""
    found = mean_interval(values)
    if len(values) < 4:
        assert found is None
        return
    assert found is not None
    mean = math.fsum(values) / len(values)
    assert found[0] - 1e-9 <= mean <= found[1] + 1e-9
    moved = mean_interval([value + shift for value in values])
    assert moved == pytest.approx([each + shift for each in found], abs=1e-6)


@pytest.mark.parametrize(("free", "quantile"), [(3, 3.1824), (4, 2.7764), (9, 2.2622), (29, 2.0452), (120, 1.9799)])
def test_interval_of_a_mean_is_students(free: int, quantile: float) -> None:
    """Its half width is the tabulated quantile of t, within 1%, times the standard error."""
    values = [float((-1) ** place) for place in range(free + 1)]
    found = mean_interval(values)
    assert found is not None
    count, mean = len(values), math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    assert (found[1] - mean) / error == pytest.approx(quantile, rel=0.01)
