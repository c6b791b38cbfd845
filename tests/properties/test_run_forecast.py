"""Laws of what a run is said to be beforehand: its counts are those of the run, its minutes follow from arithmetic."""

import json
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from finetune.config import LoadedConfig, load_config
from finetune.errors import FineTuneError
from finetune.events import Event, PhaseStarted, StepDone
from finetune.evidence import forecast
from finetune.evidence.budget import FREE
from finetune.evidence.forecast import forecast_run
from finetune.train import fine_tune
from finetune.training.prepare import prepare
from support.workplace import make_data, make_model, settings, without_reload_check

RUNS: dict[str, dict[str, Any]] = {
    "plain": {"training__epochs": 2.0},
    "packed": {"training__packing": True, "training__batch_size": 2, "training__epochs": 3.0},
    "accumulated, half an epoch over": {"training__gradient_accumulation_steps": 2, "training__epochs": 2.5},
    "stopped in the second epoch": {"training__max_steps": 6, "training__epochs": 3.0},
    "less than an epoch": {"training__max_steps": 1},
    "derived": {"training__epochs": None, "training__learning_rate": None, "training__batch_size": 5},
}


HELD = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and rows to learn, to rehearse and to hold out."""
    folder = tmp_path_factory.mktemp("forecast")
    make_model(folder / "model")
    for name, count in (("rows", 11), ("known", 5), ("valid", 4)):
        make_data(folder / f"{name}.jsonl", count)
    return folder


def loaded(place: Path, **changes: Any) -> LoadedConfig:
    """A quick run with all three."""
    data = {"data__rehearsal": str(place / "known.jsonl"), "data__valid": str(place / "valid.jsonl")}
    return settings(place / "model", place / "rows.jsonl", **{**data, **changes})


@pytest.mark.parametrize("name", RUNS)
def test_run_takes_the_steps_and_tokens_that_it_was_said_to(place: Path, tmp_path: Path, name: str) -> None:
    """Steps, tokens and trained tokens are exactly those of the run, whatever ends it; it begins by saying them."""
    said = forecast_run(prepare(loaded(place, **RUNS[name])))
    heard: list[Event] = []
    with without_reload_check():
        fine_tune(loaded(place, **RUNS[name]), output=tmp_path / "run", listener=heard.append)
    steps = [event for event in heard if isinstance(event, StepDone)]
    assert (said.steps, said.tokens, said.trained_tokens) == (
        len(steps),
        sum(step.tokens for step in steps),
        sum(step.trained_tokens for step in steps),
    )
    [told] = [event.note for event in heard if isinstance(event, PhaseStarted) and event.phase == "plan"]
    counts = f"{said.steps:,} steps, {said.tokens:,} tokens, {said.trained_tokens:,} of them trained; about "
    assert told.startswith(counts)
    assert " minutes of training here and up to " in told
    assert " of judging (an estimate: on a busy machine training took " in told


def seconds_of(monkeypatch: pytest.MonkeyPatch, gflops: float, **changes: Any) -> float:
    """The estimate for the shipped model on a machine of this speed, where starting an operation costs nothing."""
    monkeypatch.setattr(forecast, "_gflops", lambda rows, inner, columns: gflops)
    monkeypatch.setattr(forecast, "_LAYER_SECONDS", {"torch": 0.0})
    overrides = {"model.device": "cpu", "training.evaluate_every": 10**6}
    given = {key.replace("__", "."): value for key, value in changes.items()}
    found = forecast_run(prepare(load_config(None, environ={}, overrides={**overrides, **given}, profile=None)))
    assert found.seconds is not None
    return found.seconds


def test_rows_that_are_left_out_are_said_beforehand(place: Path, tmp_path: Path) -> None:
    """Rows that are dropped are a warning, by reason and place, and tokens of earlier answers are told of."""
    turns = [("user", "a"), ("assistant", "\n\n\nhi"), ("user", "b"), ("assistant", "c")]
    long = [{"role": role, "content": text} for role, text in turns]
    rows = [{"messages": long[2:]}, {"messages": long}, {"messages": [*long[:3], {**long[3], "thinking": "why"}]}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = forecast_run(prepare(loaded(place, data__train=str(file), template__name="chatml")))
    reason = "template 'chatml' does not show a thought"
    assert found.warnings == [f"data.train: 33.3% of the rows are dropped (1 of 3): 1 {reason}"]
    assert found.values()["rows"]["dropped_at"] == {reason: f"{file}:3"}
    reaching, *_ = found.sentences()
    assert reaching == "1 token reaches from a prompt into an earlier answer, and is not learned"
    assert found.values()["rows"]["reaching"] == found.rows.reaching > 0
    assert len(forecast_run(prepare(loaded(place))).sentences()) == 4


def test_answers_that_weigh_nothing_are_told_and_never_asked(place: Path, tmp_path: Path) -> None:
    """Answers that rows say not to learn are counted beforehand; a row is asked for its last answer that is learned."""

    def turn(number: int, said: str, **marks: object) -> list[dict[str, object]]:
        return [{"role": "user", "content": f"{said}{number}"}, {"role": "assistant", "content": said, **marks}]

    def file_of(name: str, numbers: range) -> str:
        rows: list[dict[str, Any]] = [
            {"messages": [*turn(number, "a", **first), *turn(number, "b", **second)]}
            for number in numbers
            for first, second in (({"weight": 0}, {"weight": 1}), ({"train": True}, {"train": False}))
        ]
        rows += [{"messages": turn(9, "c", weight=0)}, {"messages": turn(9, "d"), "weight": 0}]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    kept = file_of("kept.jsonl", range(50, 53))
    files = {"data__train": file_of("rows.jsonl", range(3)), "data__valid": kept, "data__retention": kept}
    changes = {**files, "evaluation__questions": 9, "evaluation__retention_questions": 9}
    for train_on in ("all", "last", "everything"):
        prepared = prepare(loaded(place, **changes, template__name="chatml", template__train_on=train_on))
        found = forecast_run(prepared)
        told = found.sentences()
        assert "7 answers are not learned, as rows say (weight, train)" in told
        assert found.values()["rows"]["unlearned"] == 7
        assert found.rows.dropped["weight 0"] == 1
        for questions in (prepared.questions, prepared.retention):
            assert Counter(question.expected for question in questions) == {"a": 3, "b": 3}


@pytest.mark.parametrize(("dropped", "warned"), [(2, False), (3, True)])
def test_more_than_two_per_cent_dropped_is_a_warning(place: Path, tmp_path: Path, dropped: int, warned: bool) -> None:
    """Two rows of a hundred are few; three are said before anything else, in whichever file they are."""
    rows = [{"prompt": f"p{n}", "completion": f"{n}" if n >= dropped else ""} for n in range(100)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("train", "rehearsal", "valid"):
        found = forecast_run(prepare(loaded(place, **{f"data__{name}": str(file)}))).warnings
        assert found == ([f"data.{name}: 3.0% of the rows are dropped (3 of 100): 3 empty answer"] if warned else [])
    heard: list[Event] = []
    with without_reload_check(), suppress(FineTuneError):
        fine_tune(
            loaded(place, data__train=str(file), training__max_steps=1), output=tmp_path / "run", listener=heard.append
        )
    phases = [event.phase for event in heard if isinstance(event, PhaseStarted)]
    assert ("WARNING" in phases[: phases.index("plan")]) == warned


CASES = {
    "text": ({"text": HELD + "hello<|im_end|>\n"}, 1),
    "prompt": ({"prompt": HELD, "completion": "hello<|im_end|>"}, 1),
    "prompt, answer without an end": ({"prompt": HELD, "completion": "hello"}, 1),
    "message": ({"messages": [{"role": "user", "content": HELD}, {"role": "assistant", "content": "hello"}]}, 0),
    "token": ({"prompt": "What is <|im_end|>?", "completion": "hello"}, 0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("template", ["chatml", "alpaca"])
def test_text_that_holds_turns_is_said_and_never_templated_twice(
    place: Path, tmp_path: Path, name: str, template: str
) -> None:
    """Text that holds a template's turns is taken as it is, its control tokens meant; in a message they stay text.

    Both are said beforehand; of messages those alone that have tokens of the template in use.
    """
    row, held = CASES[name]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in (row, row, {"prompt": "plain", "completion": "b"})))
    prepared = prepare(loaded(place, data__train=str(file), template__name=template))
    told = "\n".join(forecast_run(prepared).sentences())
    counts = prepared.train.counts
    assert counts.templated == ({"chatml": 2} if held else {})
    assert counts.lookalikes == (0 if held or template == "alpaca" else 2)
    assert ("2 rows hold turns of the template chatml already" in told) == bool(held)
    assert ("2 rows have the template's own tokens in what somebody says" in told) == bool(counts.lookalikes)


def test_minutes_follow_from_parameters_tokens_and_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near 4 FLOP x parameters x tokens for LoRA and 6 for a full model, in proportion to steps and speed."""
    lora = seconds_of(monkeypatch, 10.0)
    assert seconds_of(monkeypatch, 20.0) == pytest.approx(lora / 2)
    assert seconds_of(monkeypatch, 10.0, training__epochs=6.0) == pytest.approx(2 * lora)
    prepared = prepare(load_config(None, environ={}, overrides={}, profile=None))
    tokens = forecast_run(prepared).tokens
    by_hand = 4 * prepared.shape.parameters * tokens / (0.6 * 10e9)
    assert 0.8 < lora / by_hand < 1.25
    assert 1.2 < seconds_of(monkeypatch, 10.0, adapter__kind="full") / lora < 1.55


def test_judging_may_take_its_share_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """`judge.budget` times the training, and never less than what is always allowed."""
    monkeypatch.setattr(forecast, "_gflops", lambda rows, inner, columns: 10.0)
    for budget in (0.3, 50.0):
        overrides = {"model.device": "cpu", "judge.budget": budget}
        found = forecast_run(prepare(load_config(None, environ={}, overrides=overrides, profile=None)))
        assert found.seconds is not None
        assert found.judging_seconds == pytest.approx(max(budget * found.seconds, FREE / (0.6 * 10e9)))
        assert found.judging_seconds > found.seconds or budget < 1


def test_minutes_on_a_gpu_are_not_estimated(place: Path) -> None:
    """The processor's speed says nothing of a GPU: counts are told, minutes are not, and why."""
    found = forecast_run(prepare(loaded(place, backend="torch", model__device="gpu")))
    assert found.seconds is None
    assert found.steps > 0
    assert "minutes are not estimated: it computes on a GPU" in found.sentence()
    assert found.values()["minutes"] is None


def test_speed_is_measured_in_a_moment() -> None:
    """A quarter of a second of products, of no size that takes long."""
    forecast._gflops.cache_clear()
    started = time.process_time()
    assert forecast._gflops(forecast._WIDEST, 64, 64) > 0
    assert time.process_time() - started < 2.0
