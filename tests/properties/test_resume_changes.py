"""Laws of going on with a run when something has changed since: refused where it matters, told where it may differ."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.chat import encoder
from finetune.config import load_plan, plan_as_list
from finetune.errors import RefusedError
from finetune.events import CheckpointSaved, Event, RunResumed
from finetune.evidence import record
from finetune.train import fine_tune
from support.damages import longer
from support.disks import everything_below
from support.workplace import (
    ADAPTER,
    OWN_TEMPLATE,
    Death,
    ended,
    make_data,
    make_model,
    resume,
    settings,
    without_reload_check,
)


def die_at_step_4(event: Event) -> None:
    """Die right after the checkpoint of step 4."""
    if isinstance(event, CheckpointSaved) and event.step == 4:
        raise Death


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its data (two files of the same name among them), a template, and a run killed at step 4 of 8."""
    place = tmp_path_factory.mktemp("changes")
    model, data = make_model(place / "model"), make_data(place / "rows.jsonl", 11)
    for name, count in (("valid", 4), ("known", 5)):
        (place / name).mkdir()
        make_data(place / name / f"{name}.jsonl", count).rename(place / name / "rows.jsonl")
    (place / "own.jinja").write_text(OWN_TEMPLATE)
    loaded = settings(
        model,
        data,
        data__valid=str(place / "valid" / "rows.jsonl"),
        data__retention=str(place / "known/rows.jsonl"),
        template__name=str(place / "own.jinja"),
        training__save_every=2,
        adapter__dropout=0.2,
    )
    with without_reload_check():
        with contextlib.suppress(Death):
            fine_tune(loaded, output=place / "run", listener=die_at_step_4)
        fine_tune(loaded, output=place / "whole")
    assert not (place / "run" / "run.json").exists()
    return place


@pytest.fixture
def place(killed: Path) -> Any:
    """The killed run, as it was each time: paths in its plan stay good."""
    kept = killed.with_name("kept")
    shutil.copytree(killed, kept)
    yield killed
    shutil.rmtree(killed)
    kept.rename(killed)


def in_plan(old: str, new: str) -> Callable[[Path], None]:
    """Change a line of the plan."""

    def change(place: Path) -> None:
        text = (place / "run" / "plan.yaml").read_text()
        assert old in text
        (place / "run" / "plan.yaml").write_text(text.replace(old, new))

    return change


def _other_weights(place: Path) -> None:
    shutil.rmtree(place / "model")
    make_model(place / "model", seed=1)


def _lost_events(place: Path) -> None:
    (place / "run" / "events.jsonl").write_text("")


ROW = '{"prompt": "more", "completion": "1"}\n'
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "training rows": (longer("rows.jsonl", ROW), "data.train file"),
    "held-out rows of the same name": (longer("valid/rows.jsonl", ROW), "data.valid file"),
    "retention rows of the same name": (longer("known/rows.jsonl", ROW), "data.retention file"),
    "template": (longer("own.jinja", "{# #}"), "template"),
    "tokenizer": (longer("model/tokenizer.json", "\n"), "model tokenizer.json"),
    "tokenizer's settings": (longer("model/tokenizer_config.json", "\n"), "model tokenizer_config.json"),
    "tokenizer's special words": (longer("model/special_tokens_map.json", "{}"), "model special_tokens_map.json"),
    "shape of the model": (longer("model/config.json", "\n"), "model config.json"),
    "weights": (_other_weights, "model model.safetensors"),
    "learning rate": (in_plan("learning_rate: 0.01", "learning_rate: 0.02"), "training.learning_rate: 0.01 -> 0.02"),
    "dtype": (in_plan("dtype: float32", "dtype: bfloat16"), "model.dtype: 'float32' -> 'bfloat16'"),
    "what is kept": (
        in_plan("load_best_model: false", "load_best_model: true"),
        "training.load_best_model: False -> True",
    ),
    "events": (_lost_events, "tells of 0 of the 4 steps"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_resume_of_a_run_that_would_not_be_the_same_is_refused(what: str, place: Path) -> None:
    """Whatever changes the weights or their judgement is refused, by name, before anything is done or removed."""
    change, named = REFUSED[what]
    change(place)
    before = everything_below(place / "run")
    with pytest.raises(RefusedError) as caught:
        resume(place / "run")
    assert named in caught.value.message
    assert caught.value.hint
    assert everything_below(place / "run") == before


@pytest.mark.parametrize("count", [11, 4], ids=["trained", "held out"])
def test_resume_with_a_library_that_makes_other_ids_is_refused(
    count: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files all alike, and other token ids out of them, of rows to train on or to look at: refused, whatever why."""
    plain, turned = encoder.mark_rows, []

    def turn(rows: Any, tokenizer: Any) -> Any:
        rows = list(rows)
        turned.append(len(rows) == count)
        return plain(rows[::-1] if turned[-1] else rows, tokenizer)

    monkeypatch.setattr(encoder, "mark_rows", turn)
    with pytest.raises(RefusedError, match="token ids: "):
        resume(place / "run")
    assert turned.count(True) == 1


def test_every_setting_must_be_the_same_but_those_that_change_no_weight(killed: Path) -> None:
    """Of all settings only who is told, where ids are kept and how often is saved may be others on resume."""
    manifest = json.loads((killed / "run" / "checkpoints" / "step-00000004" / "checkpoint.json").read_text())
    keys = {entry["key"] for entry in plan_as_list(load_plan(killed / "run" / "plan.yaml"))}
    assert len(keys) > 40
    free = {"tracking.to", "tracking.project", "tracking.name", "tokens.cache", "training.save_every"}
    assert keys & manifest["told"].keys() == free
    assert keys - free <= manifest["identity"].keys()


def _other_library(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    versions = record._versions()
    monkeypatch.setattr(record, "_versions", lambda: versions | {"tokenizers": "99.0"})


def _other_machine(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 77)


def _other_tracking(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    in_plan("project: finetune", "project: mine")(place)


def _other_rhythm(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    in_plan("save_every: 2", "save_every: 3")(place)


TOLD: dict[str, tuple[Callable[[pytest.MonkeyPatch, Path], None], str]] = {
    "a library": (_other_library, "-> '99.0'"),
    "the machine": (_other_machine, "-> 77"),
    "who is told": (_other_tracking, "tracking.project: 'finetune' -> 'mine'"),
    "how often is saved": (_other_rhythm, "training.save_every: 2 -> 3"),
}


@pytest.mark.parametrize("what", [None, *TOLD])
def test_resume_says_exactly_what_is_not_as_it_was(
    what: str | None, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may differ is told, once, as old and new value, in the log, in run.json and to listeners; and only that."""
    if what is not None:
        TOLD[what][0](monkeypatch, place)
    heard: list[Event] = []
    with without_reload_check():
        found = resume(place / "run", listener=heard.append)
    [resumed] = [event for event in heard if isinstance(event, RunResumed)]
    assert resumed.step == 4
    assert len(resumed.changes) == (0 if what is None else 1)
    assert all(TOLD[what][1] in change for change in resumed.changes if what)
    assert any("resumed from step 4" in note for note in found["notes"])
    notes = [note for note in found["notes"] if "not as it was" in note]
    assert notes == [f"since the run was resumed from step 4, this is not as it was: {one}" for one in resumed.changes]
    logged = [json.loads(line) for line in (place / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["changes"] for event in logged if event["event"] == "RunResumed"] == [list(resumed.changes)]
    assert (place / "run" / ADAPTER).read_bytes() == (place / "whole" / ADAPTER).read_bytes()


def test_resumed_run_keeps_the_derived_rate_of_its_start(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rate and epochs that were derived are written into the plan: a run goes on with them by whatever rule."""
    loaded = settings(
        killed / "model",
        killed / "rows.jsonl",
        training__save_every=2,
        training__learning_rate=None,
        training__epochs=None,
    )
    with without_reload_check():
        with contextlib.suppress(Death):
            fine_tune(loaded, output=tmp_path / "run", listener=die_at_step_4)
        plan = load_plan(tmp_path / "run" / "plan.yaml")
        rules = sys.modules["finetune.config.resolve"]
        monkeypatch.setattr(rules, "derived_learning_rate", lambda parameters, kind, objective: 1.0)
        monkeypatch.setattr(rules, "derived_epochs", lambda rows, steps_per_epoch: 1.0)
        resume(tmp_path / "run")
        fine_tune(loaded, output=tmp_path / "another")
    training = plan.config.training
    assert (training.learning_rate, training.epochs) == (5e-3, 8.0)
    assert plan.origins["training.learning_rate"] == plan.origins["training.epochs"] == "derived"
    assert load_plan(tmp_path / "run" / "plan.yaml") == plan
    assert max(step["learning_rate"] for step in ended(tmp_path / "run")["losses"]["train"]) == 5e-3
    assert max(step["learning_rate"] for step in ended(tmp_path / "another")["losses"]["train"]) == 1.0
