"""Laws of making a run longer: what was done stays done, and what comes is what a run planned so long would do."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from finetune.cli.app import run as ft
from finetune.config import LoadedConfig, load_plan
from finetune.errors import FineTuneError, OutputError, RefusedError, UsageError
from finetune.events import CheckpointSaved, Event, RunLengthened, StepDone
from finetune.train import fine_tune
from finetune.training.longer import Longer
from support.disks import everything_below
from support.workplace import ADAPTER, OWN_TEMPLATE, Death, ended, make_data, make_model, settings, without_reload_check

EPOCH = 4
"""Steps of an epoch: eleven rows, three at once."""


def lengthen(run: Path, longer: Longer, **how: Any) -> dict[str, Any]:
    """Make a run longer, as `ft train --resume RUN --epochs N` does; what run.json then holds."""
    plan = load_plan(run / "plan.yaml")
    with without_reload_check():
        return fine_tune(LoadedConfig(plan.config, plan.origins), output=run, resume=longer, **how)[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its data."""
    place = tmp_path_factory.mktemp("longer")
    make_model(place / "model")
    make_data(place / "rows.jsonl", 11)
    make_data(place / "others.jsonl", 3)
    return place


def train(place: Path, output: Path, **changes: Any) -> Path:
    """A finished run."""
    chosen = {"training__schedule": "constant", "training__warmup_fraction": 0.0, "adapter__dropout": 0.2, **changes}
    with without_reload_check():
        fine_tune(settings(place / "model", place / "rows.jsonl", **chosen), output=output)
    return output


@pytest.mark.slow
@hypothesis_settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(first=st.integers(1, 6), more=st.integers(1, 5), again=st.integers(0, 3))
def test_longer_with_a_constant_rate_is_the_long_run_bit_for_bit(
    place: Path, tmp_path_factory: pytest.TempPathFactory, first: int, more: int, again: int
) -> None:
    """Made longer once or twice, in the middle of an epoch or between two: the bytes of the run made in one go."""
    folder = tmp_path_factory.mktemp("run")
    run = train(place, folder / "run", training__epochs=9, training__max_steps=first)
    total = first + more
    lengthen(run, Longer(max_steps=total))
    if again:
        total += again
        lengthen(run, Longer(max_steps=total))
    whole = train(place, folder / "whole", training__epochs=9, training__max_steps=total)
    assert (run / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    steps, wanted = ended(run)["losses"]["train"], ended(whole)["losses"]["train"]
    assert steps == wanted
    assert len(steps) == total


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_steps_to_come_have_the_rate_of_the_long_run_and_those_done_keep_theirs(
    place: Path, tmp_path: Path, schedule: str
) -> None:
    """Whatever the schedule: first the rates of the short plan, from there on those of the long one; told."""
    chosen = {"training__schedule": schedule, "training__warmup_fraction": 0.25}
    run = train(place, tmp_path / "run", training__epochs=1, **chosen)
    short = [step["learning_rate"] for step in ended(run)["losses"]["train"]]
    heard: list[Event] = []
    found = lengthen(run, Longer(epochs=3.0), listener=heard.append)
    whole = train(place, tmp_path / "whole", training__epochs=3, **chosen)
    long = [step["learning_rate"] for step in ended(whole)["losses"]["train"]]
    assert [step["learning_rate"] for step in found["losses"]["train"]] == short + long[EPOCH:]
    [told] = [event for event in heard if isinstance(event, RunLengthened)]
    assert (told.step, told.planned_steps, told.total_steps) == (EPOCH, EPOCH, 3 * EPOCH)
    assert found["training"]["lengthened"] == [{"step": EPOCH, "planned_steps": EPOCH, "total_steps": 3 * EPOCH}]
    [note] = [note for note in found["notes"] if "made longer" in note]
    assert f"from {EPOCH} to {3 * EPOCH} steps" in note
    assert f"{short[-1]:.3g} at step {EPOCH}, {long[EPOCH]:.3g} at step {EPOCH + 1}" in note


@pytest.mark.slow
@pytest.mark.parametrize("death", range(12))
def test_longer_run_that_dies_at_any_moment_goes_on_to_the_same_bytes(place: Path, tmp_path: Path, death: int) -> None:
    """Killed at any event of the longer part, the run resumes by itself or when it is asked again to be so long."""
    run = train(place, tmp_path / "run", training__epochs=1, training__save_every=3)
    shutil.copytree(run, tmp_path / "copy")
    count = 0

    def die(event: Event) -> None:
        nonlocal count
        count += isinstance(event, (RunLengthened, StepDone, CheckpointSaved))
        if count == death + 1:
            raise Death

    with contextlib.suppress(Death):
        lengthen(run, Longer(epochs=2.0), listener=die)
    if not (run / "run.json").exists():
        asked = death % 2 or load_plan(run / "plan.yaml").config.training.epochs != 2
        lengthen(run, Longer(epochs=2.0)) if asked else _resume(run)
    lengthen(tmp_path / "copy", Longer(epochs=2.0))
    assert (run / ADAPTER).read_bytes() == (tmp_path / "copy" / ADAPTER).read_bytes()
    assert ended(run)["losses"]["train"] == ended(tmp_path / "copy")["losses"]["train"]


def _resume(run: Path) -> None:
    plan = load_plan(run / "plan.yaml")
    with without_reload_check():
        fine_tune(LoadedConfig(plan.config, plan.origins), output=run, resume=True)


def test_control_of_a_longer_run_goes_at_its_pace(place: Path, tmp_path: Path) -> None:
    """The shuffled-label control takes each step at the learning rate that the run itself took it at."""
    run = train(place, tmp_path / "run", training__epochs=1, training__schedule="linear", judge__control="always")
    heard: list[Event] = []
    found = lengthen(run, Longer(epochs=2.0), listener=heard.append)
    rates = [event.learning_rate for event in heard if isinstance(event, StepDone)][-2 * EPOCH :]
    assert rates == [step["learning_rate"] for step in found["losses"]["train"]]


def _stopped(place: Path, run: Path) -> Path:
    stops = {"early_stopping_patience": 1, "early_stopping_min_delta": 50.0, "evaluate_every": 1}
    changes = {f"training__{key}": value for key, value in stops.items()}
    return train(place, run, training__epochs=4, data__valid=str(place / "others.jsonl"), **changes)


def _exported(place: Path, run: Path) -> Path:
    (train(place, run, training__epochs=1) / "merged").mkdir()
    return run


def _bare(place: Path, run: Path) -> Path:
    shutil.rmtree(train(place, run, training__epochs=1) / "checkpoints")
    return run


def _plain(place: Path, run: Path) -> Path:
    return train(place, run, training__epochs=2)


REFUSED: dict[str, tuple[Callable[[Path, Path], Path], Longer, type[FineTuneError], str]] = {
    "shorter": (_plain, Longer(epochs=1.0), UsageError, "has done 8 steps, and it is to end with step 4"),
    "as long": (_plain, Longer(epochs=2.0), UsageError, "has done 8 steps, and it is to end with step 8"),
    "fewer steps": (_plain, Longer(epochs=5.0, max_steps=7), UsageError, "to end with step 7"),
    "stopped early": (_stopped, Longer(epochs=9.0), RefusedError, "was stopped early at step 2"),
    "exported": (_exported, Longer(epochs=2.0), OutputError, "made of its adapter as it is: merged"),
    "no checkpoint": (_bare, Longer(epochs=2.0), RefusedError, "no checkpoint to go on from"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_longer_is_refused_where_it_means_nothing_and_nothing_is_changed(
    place: Path, tmp_path: Path, what: str
) -> None:
    """Shorter than done, stopped early, exported already: refused with the numbers and a way, and every byte stays."""
    make, longer, kind, words = REFUSED[what]
    run = make(place, tmp_path / "run")
    before = everything_below(run)
    with pytest.raises(kind) as caught:
        lengthen(run, longer)
    assert words in caught.value.message
    assert caught.value.hint
    assert everything_below(run) == before


def test_length_changed_by_hand_is_refused(place: Path, tmp_path: Path) -> None:
    """Only who asks for it makes a run longer: a plan that was edited is still not the run's own."""
    run = train(place, tmp_path / "run", training__epochs=1)
    (run / "run.json").unlink()
    plan = (run / "plan.yaml").read_text()
    (run / "plan.yaml").write_text(plan.replace("epochs: 1.0", "epochs: 3.0"))
    with pytest.raises(RefusedError, match=r"training\.epochs: 1\.0 -> 3\.0"):
        _resume(run)


def test_command_makes_a_named_run_longer(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ft train --resume RUN --epochs N` says the schedule's rule; anything else beside it is refused with exit 2."""
    run = train(place, tmp_path / "run", training__epochs=1)
    before = everything_below(run)
    for odd in (["--lr", "1"], ["--set", "adapter.rank=3"], ["--model", "x"], ["--output", str(tmp_path)]):
        assert ft(["train", "--resume", str(run), "--epochs", "2", *odd]) == 2
    assert ft(["train", "--resume", str(place / "rows.jsonl")]) == 2
    assert ft(["train", "--resume", str(run), "--epochs", "none"]) == 2
    assert ft(["train", "--resume", str(run), "--steps", "0"]) == 2
    assert everything_below(run) == before
    capsys.readouterr()
    with without_reload_check():
        assert ft(["train", "--resume", str(run), "--steps", "6", "--json"]) in (0, 1, 4)
    told = capsys.readouterr()
    assert json.loads(told.out)["training"]["steps"] == 6
    assert "from 4 to 6 steps" in told.err
    assert ft(["train", "--resume", "--output", str(run)]) != 0
    assert "make it longer" in capsys.readouterr().err


def test_resume_elsewhere_reads_the_template_of_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template named by a relative path is the file of where the run began, wherever it is resumed."""
    for name, template in (("here", OWN_TEMPLATE), ("elsewhere", OWN_TEMPLATE.replace(": ", " says "))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.jinja").write_text(template)
    monkeypatch.chdir(tmp_path / "here")

    def die(event: Event) -> None:
        if isinstance(event, StepDone):
            raise Death

    loaded = settings(place / "model", place / "rows.jsonl", template__name="own.jinja")
    with without_reload_check(), contextlib.suppress(Death):
        fine_tune(loaded, output=tmp_path / "run", listener=die)
    os.chdir(tmp_path / "elsewhere")
    _resume(tmp_path / "run")
    assert (tmp_path / "run" / "adapter" / "chat_template.jinja").read_text() == OWN_TEMPLATE
