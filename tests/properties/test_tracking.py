"""Laws of trackers: told every step once, whatever kills the run, and unable to do it any harm."""

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.config import LoadedConfig
from finetune.config.schema import Trackers as Names
from finetune.events import (
    Event,
    FixedLoss,
    HeldOutLoss,
    RunJudged,
    RunResumed,
    RunStarted,
    StepDone,
    StoppedEarly,
    TrackerFailed,
    TrackerOpened,
    event_as_dict,
    event_from_dict,
)
from finetune.report.progress import Progress
from finetune.run.folder import RunFolder
from finetune.tracking import consumer
from finetune.tracking import tracker as trackers_known
from finetune.tracking.numbers import Digest
from finetune.tracking.tracker import Tracked
from finetune.train import fine_tune
from finetune_strategies.profiles import examples
from support.trackers import SilentTracker
from support.workplace import ADAPTER, Death, ended, run, settings, without_reload_check

pytestmark = pytest.mark.tools

STEPS = 6


def job(model: Path, data: Path, *to: str, **changes: Any) -> LoadedConfig:
    """Six steps, a look after every second, a checkpoint every third, told to these trackers."""
    named = {"max_steps": STEPS, "epochs": 99.0, "evaluate_every": 2, "save_every": 3}
    more = {f"training__{key}": value for key, value in named.items()} | changes
    return settings(model, data, data__valid_fraction=0.3, adapter__dropout=0.3, tracking__to=list(to), **more)


@contextlib.contextmanager
def trackers(made: Callable[[str, Tracked], Any]) -> Iterator[None]:
    """Within this context every package is there, and these trackers are opened."""
    with patch.object(trackers_known, "find_spec", lambda name: name), patch.object(consumer, "open_tracker", made):
        yield


def test_trackers_have_one_name_everywhere() -> None:
    """The schema, the room and the extras of the package name the same four trackers."""
    [values] = [get_args(part) for part in get_args(get_args(Names)[0]) if get_args(part)]
    assert values == trackers_known.NAMES
    assert len(trackers_known.NAMES) == 4
    folder = Path(trackers_known.__file__).parent
    assert all((folder / f"{name}.py").exists() for name in trackers_known.NAMES)
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert all(f"\n{name} = [" in project for name in trackers_known.NAMES)


def numbers_by_step(events: list[Event]) -> dict[int, set[str]]:
    """The names of the numbers that each step must have."""
    found: dict[int, set[str]] = {}
    for event in events:
        if isinstance(event, HeldOutLoss):
            found.setdefault(event.step, set()).add("held_out/loss")
        elif isinstance(event, FixedLoss) and event.step == 0:
            found.setdefault(0, set()).add("fixed/loss")
        elif isinstance(event, StepDone):
            found.setdefault(event.step, set()).update(
                f"train/{name}"
                for name in ("loss", "learning_rate", "grad_norm", "epoch", "tokens", "tokens_per_second", "rss_bytes")
            )
    return found


def test_tracker_is_told_the_whole_run(model: Path, data: Path, tmp_path: Path) -> None:
    """Settings at the start; losses, rates, norms, held-out losses by step; verdicts and the kept step at the end."""
    opened: list[Tracked] = []
    tracker = SilentTracker()
    with trackers(lambda name, tracked: opened.append(tracked) or tracker):
        heard = run(job(model, data, "wandb", tracking__project="p"), tmp_path / "one")
        record = ended(tmp_path / "one")
    [tracked] = opened
    events = [json.loads(line) for line in (tmp_path / "one" / "events.jsonl").read_text().splitlines()]
    assert tracked.parameters == {entry["key"]: entry["value"] for entry in record["plan"]}
    assert (tracked.id, tracked.name, tracked.project) == (events[0]["id"], "one", "p")
    assert len(tracked.id) == 16
    assert {step: set(numbers) for step, numbers in tracker.steps} == numbers_by_step(heard)
    assert [step for step, _ in tracker.steps] == list(range(STEPS + 1))
    told = dict(tracker.steps)
    assert [told[point["step"]]["train/loss"] for point in record["losses"]["train"]] == [
        point["loss"] for point in record["losses"]["train"]
    ]
    assert [told[point["step"]]["held_out/loss"] for point in record["losses"]["held_out"]] == [
        point["loss"] for point in record["losses"]["held_out"]
    ]
    [(words, numbers, complete)] = tracker.ended
    assert complete
    assert numbers == {"final/fixed_loss": record["losses"]["fixed"][-1]["loss"], "final/kept_step": float(STEPS)}
    assert words == {"outcome": record["outcome"]} | {f"verdict/{v['id']}": v["outcome"] for v in record["verdicts"]}
    assert [event for event in heard if isinstance(event, TrackerOpened)] == [TrackerOpened("wandb", "memory")]
    assert record["tracking"] == [{"tracker": "wandb", "place": "memory", "failures": 0}]


@given(st.data())
@examples(1 / 3)
def test_tracker_holds_each_step_once_wherever_the_run_is_killed(model: Path, data: Path, data_: st.DataObject) -> None:
    """Killed at any event, twice, a tool that knows its last step holds every step once, with the run's own losses."""
    tool = SilentTracker()
    with TemporaryDirectory() as name, trackers(lambda which, tracked: reopened(tool)):
        output = Path(name) / "run"
        for death in [*data_.draw(st.lists(st.integers(0, 26), min_size=1, max_size=2)), None]:
            if not (output / "run.json").exists():
                run(job(model, data, "mlflow"), output, death=death)
        record = ended(output)
    assert [step for step, _ in tool.steps] == list(range(STEPS + 1))
    told = dict(tool.steps)
    assert [told[point["step"]]["train/loss"] for point in record["losses"]["train"]] == [
        point["loss"] for point in record["losses"]["train"]
    ]
    assert [told[point["step"]]["held_out/loss"] for point in record["losses"]["held_out"] if point["step"]] == [
        point["loss"] for point in record["losses"]["held_out"] if point["step"]
    ]


def reopened(tool: SilentTracker) -> SilentTracker:
    """The same tool in another process: it knows the last step that it holds."""
    tool.last_step = max((step for step, _ in tool.steps), default=-1)
    return tool


def test_tracker_that_was_killed_before_it_was_open_is_told_the_whole_run(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """Opened only by the process that goes on, a tracker is told what was done before; the run keeps its id."""
    opened: list[Tracked] = []
    tool = SilentTracker()
    with trackers(lambda name, tracked: opened.append(tracked) or SilentTracker()):
        heard = run(job(model, data, "wandb"), tmp_path / "whole")
        said = [event for event in heard if not isinstance(event, TrackerOpened)]
        death = next(place for place, event in enumerate(said) if isinstance(event, StepDone) and event.step == 5)
        run(job(model, data, "wandb"), tmp_path / "run", death=death)
    with trackers(lambda name, tracked: opened.append(tracked) or tool):
        heard = run(job(model, data, "wandb"), tmp_path / "run")
        record = ended(tmp_path / "run")
    assert [event.step for event in heard if isinstance(event, RunResumed)] == [3]
    assert [one.resumed for one in opened] == [False, False, True]
    assert opened[0].id != opened[1].id == opened[2].id
    assert [step for step, _ in tool.steps] == list(range(STEPS + 1))
    assert [numbers["train/loss"] for step, numbers in tool.steps if step] == [
        point["loss"] for point in record["losses"]["train"]
    ]


_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda of: st.dictionaries(st.text(), of))
_EVENTS = {RunStarted: st.builds(RunStarted, made_from=st.dictionaries(st.text(), _JSON))}


@given(st.sampled_from(get_args(Event)).flatmap(lambda kind: _EVENTS.get(kind, st.from_type(kind))))
def test_event_is_read_back_from_json_as_it_was(event: Event) -> None:
    """Every kind of event survives the log: what is read back is what was told."""
    if not getattr(event, "seconds", 1.0):
        return
    read = json.loads(json.dumps(event_as_dict(event)))
    assert repr(event_from_dict(read)) == repr(event)


class Harmful(SilentTracker):
    """A tracker that fails in one of its verbs."""

    def __init__(self, verb: str, act: Callable[[], None]) -> None:
        super().__init__()
        self.verb, self.act = verb, act

    def log(self, *told: Any) -> None:
        """Fail, or keep one step."""
        self.act() if self.verb == "log" else super().log(*told)

    def finish(self, *told: Any, **named: Any) -> None:
        """Fail, or keep how the run ended."""
        self.act() if self.verb == "finish" else super().finish(*told, **named)


def _raise(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


HARMS: dict[str, tuple[Callable[[], None], str]] = {
    "an error": (_raise(ConnectionError("no route to\nhost")), "ConnectionError: no route to"),
    "an error without words": (_raise(ValueError()), "ValueError"),
    "a way out of the process": (_raise(SystemExit(3)), "SystemExit: 3"),
    "an interrupt": (_raise(KeyboardInterrupt()), "KeyboardInterrupt"),
    "somebody's death": (_raise(Death()), "Death"),
}


@pytest.fixture(scope="module")
def untracked(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, bytes]:
    """What the same run tells and makes without a tracker."""
    folder = tmp_path_factory.mktemp("untracked") / "run"
    run(job(model, data), folder)
    return ended(folder), (folder / ADAPTER).read_bytes()


@pytest.fixture
def job_of_two(model: Path, data: Path) -> LoadedConfig:
    """A run that two trackers are told of."""
    return job(model, data, "wandb", "mlflow")


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("verb", ["open", "log", "finish"])
def test_tracker_that_fails_harms_nothing_and_is_told_once(
    verb: str,
    harm: str,
    job_of_two: LoadedConfig,
    untracked: tuple[Any, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever a tracker raises, the run and the other tracker get all they would; it is told once, and counted."""
    act, named = HARMS[harm]
    sound = SilentTracker()

    def opened(name: str, tracked: Tracked) -> Any:
        if name == "mlflow":
            return sound
        if verb == "open":
            act()
        return Harmful(verb, act)

    with trackers(opened):
        heard = run(job_of_two, tmp_path / "run")
        record = ended(tmp_path / "run")
    plain, weights = untracked
    assert (tmp_path / "run" / ADAPTER).read_bytes() == weights
    assert {key: record[key] for key in ("losses", "verdicts", "scores", "training")} == {
        key: plain[key] for key in ("losses", "verdicts", "scores", "training")
    }
    assert [step for step, _ in sound.steps] == list(range(STEPS + 1))
    [failed] = [event for event in heard if isinstance(event, TrackerFailed)]
    assert (failed.tracker, failed.error) == ("wandb", named)
    count = {"open": STEPS + 2, "log": STEPS + 1, "finish": 1}[verb]
    assert record["tracking"][0]["failures"] == count
    assert record["tracking"][1] == {"tracker": "mlflow", "place": "memory", "failures": 0}
    [note] = [note for note in record["notes"] if "tracker" in note]
    assert f"wandb failed {count} time{'s' * (count > 1)}," in note
    assert named in note
    Progress()(failed)
    assert "warning: tracker wandb failed" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["open", "log", "finish"])
def test_tracker_that_hangs_is_left_behind(
    verb: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracker that never answers costs a run no more than the patience at its end; what it missed is told."""
    monkeypatch.setattr(consumer, "PATIENCE", 0.05)
    freed = threading.Event()

    def opened(name: str, tracked: Tracked) -> Any:
        if verb == "open":
            freed.wait(60)
        return Harmful(verb, lambda: freed.wait(60) and None)

    try:
        started = time.monotonic()
        with trackers(opened):
            heard = run(job(model, data, "wandb"), tmp_path / "run")
            record = ended(tmp_path / "run")
        assert time.monotonic() - started < 50
        assert any(isinstance(event, TrackerFailed) and "not done" in event.error for event in heard)
        assert any("wandb failed 1 time," in note for note in record["notes"])
        assert (tmp_path / "run" / "run.json").exists()
    finally:
        freed.set()


def test_tracker_that_is_too_slow_loses_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracker that cannot keep up is not waited for: what finds no room is counted, and memory stays as it is."""
    freed, warned = threading.Event(), []
    monkeypatch.setattr(consumer, "_MOST_WAITING", 4)
    monkeypatch.setattr(consumer, "PATIENCE", 20.0)
    monkeypatch.setattr(consumer, "open_tracker", lambda name, tracked: freed.wait(60) and SilentTracker())
    tracked = Tracked("id", "name", "project", Path("."), {})
    told = consumer.Trackers(["wandb"], tracked, warned.append)
    started = time.monotonic()
    for step in range(1, 11):
        told(HeldOutLoss(step, 1.0, 1))
    assert time.monotonic() - started < 30
    freed.set()
    told.close(complete=True)
    assert told.places() == [{"tracker": "wandb", "place": "memory", "failures": 6}]
    assert [event.error for event in warned if isinstance(event, TrackerFailed)] == ["it is too slow: events were lost"]


def test_tracker_of_a_run_that_fails_is_closed_as_failed(model: Path, data: Path, tmp_path: Path) -> None:
    """A run that dies of an error has its trackers closed: they hold the steps there were, and that it failed."""
    tracker = SilentTracker()
    with (
        trackers(lambda name, tracked: tracker),
        patch("finetune.train.judge", side_effect=RuntimeError("judge")),
        pytest.raises(RuntimeError),
    ):
        run(job(model, data, "wandb"), tmp_path / "run")
    assert [step for step, _ in tracker.steps] == list(range(STEPS + 1))
    [(words, _, complete)] = tracker.ended
    assert not complete
    assert "outcome" not in words


def test_run_is_let_go_even_when_its_listener_dies_of_what_a_tracker_says(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """A listener that fails at every word, those at the very end included, leaves a run folder that can be claimed."""
    dead = threading.Event()

    def opened(name: str, tracked: Tracked) -> Any:
        dead.wait(60)
        return SilentTracker()

    def listen(event: Event) -> None:
        if isinstance(event, StepDone | TrackerOpened):
            dead.set()
            raise Death

    with trackers(opened), without_reload_check(), pytest.raises(Death):
        fine_tune(job(model, data, "wandb"), output=tmp_path / "run", listener=listen)
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    folder.release()


def steps(count: int) -> list[Event]:
    """The events of so many steps."""
    return [StepDone(step, 9, 1.0, float(step), 0.1, 1.0, 3, 2, 0.5, 7) for step in range(1, count + 1)]


@given(st.integers(0, 6), st.sets(st.integers(0, 6)), st.booleans(), st.booleans())
@example(3, {0, 2}, True, True)
def test_digest_gives_every_step_once_and_in_order(count: int, looked: set[int], fixed: bool, early: bool) -> None:
    """A look belongs to its step and is given with it; steps go up; what has no step is for the end."""
    events: list[Event] = [FixedLoss(0, 5.0, 1)] if fixed else []
    events += [HeldOutLoss(0, 10.0, 1)] if 0 in looked else []
    for event in steps(count):
        assert isinstance(event, StepDone)
        events += [HeldOutLoss(event.step, 10.0 + event.step, 1)] if event.step in looked else []
        events += [StoppedEarly(event.step, 9, 1, 1, 1.0)] if early and event.step == count else []
        events.append(event)
    events += [FixedLoss(count, 4.0, 1), RunJudged("passed", {"a": "passed"})] if count else []
    digest = Digest()
    given_ = [pair for event in events for pair in digest.take(event)]
    given_ += list(digest.rest())
    assert list(digest.rest()) == []
    assert [step for step, _ in given_] == sorted({step for step, _ in given_})
    assert {step: set(numbers) for step, numbers in given_} == numbers_by_step(events)
    assert all(numbers.get("held_out/loss", 10.0 + step) == 10.0 + step for step, numbers in given_)
    assert digest.numbers == ({"final/fixed_loss": 4.0, "final/kept_step": float(count)} if count else {})
    assert ("ended" in digest.words) == (early and count > 0)
    assert digest.words.get("verdict/a") == ("passed" if count else None)


def test_tracked_run_is_a_frozen_value() -> None:
    """What a tracker is given of the run cannot be changed by it."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Tracked("id", "name", "project", Path("."), {}).id = "other"  # type: ignore[misc]
