"""Laws of whole runs that stop early or keep their best step: wherever they are killed, they end as they would have."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune import train as training
from finetune.backends.reference.session import ReferenceSession
from finetune.config import LoadedConfig
from finetune.errors import RefusedError
from finetune.events import Event, HeldOutLoss, StepDone, StoppedEarly
from finetune.evidence.extra_runs import shuffled_label_rows
from finetune.report import build_report, render_html
from finetune.training.prepare import prepare
from finetune.training.schedule import learning_rate_at
from finetune_strategies.profiles import examples
from properties.test_training import lowest
from support.workplace import ADAPTER, ended, run, settings

STEPS = 8


def job(model: Path, data: Path, **changes: Any) -> LoadedConfig:
    """Eight steps of one batch, a look after each, a checkpoint every third, dropout so that random state matters."""
    given_ = {
        "max_steps": STEPS,
        "epochs": 99.0,
        "evaluate_every": 1,
        "save_every": 3,
        "load_best_model": True,
        **changes,
    }
    named = {f"training__{key}": value for key, value in given_.items()}
    return settings(model, data, data__valid_fraction=0.3, adapter__dropout=0.3, evaluation__questions=1, **named)


@contextlib.contextmanager
def looks(losses: list[float]) -> Iterator[None]:
    """Within this context the look at step n shows the n-th of these losses; training itself is as it is."""
    plain = training.train

    def told(*given_: Any, **named: Any) -> Iterator[Event]:
        for event in plain(*given_, **named):
            looked = isinstance(event, HeldOutLoss)
            yield HeldOutLoss(event.step, losses[event.step - 1], event.tokens) if looked else event

    with patch.object(training, "train", told):
        yield


def last_step(losses: list[float], stop_after: int | None) -> int:
    """The step after which a run with these looks ends."""
    due = [step for step in range(1, STEPS + 1) if stop_after and step - lowest(losses[:step]) >= stop_after]
    return due[0] if due else STEPS


CURVES = st.lists(st.sampled_from([1.0, 1.5, 2.0, 2.5, 3.0]), min_size=STEPS, max_size=STEPS)


@given(CURVES, st.none() | st.integers(1, 3), st.booleans())
@example([3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0], 2, True)
@example([2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 3, True)
@example([3.0, 2.5, 2.0, 1.5, 1.0, 1.0, 1.0, 3.0], 3, False)
@examples(1 / 3)
def test_run_ends_and_keeps_what_its_looks_say(
    model: Path, data: Path, losses: list[float], stop_after: int | None, keep: bool
) -> None:
    """The last step is the rule's, the adapter is that of the last or of the best step, and run.json says which."""
    end = last_step(losses, stop_after)
    kept = lowest(losses[:end]) if keep else end
    with TemporaryDirectory() as name, looks(losses):
        place = Path(name)
        heard = run(job(model, data, early_stopping_patience=stop_after, load_best_model=keep), place / "run")
        told = ended(place / "run")
        assert (place / "run" / ADAPTER).read_bytes() == weights_of(model, data, place / "plain", kept)
        stays = {int(path.name[5:]) for path in (place / "run" / "checkpoints").iterdir()}
    steps = [event for event in heard if isinstance(event, StepDone)]
    assert [event.step for event in steps] == list(range(1, end + 1))
    assert {event.total_steps for event in steps} == {STEPS}
    warmup = round(0.05 * STEPS)
    assert [event.learning_rate for event in steps] == [
        learning_rate_at(step, STEPS, learning_rate=0.01, warmup_steps=warmup, schedule="cosine")
        for step in range(1, end + 1)
    ]
    early = [event for event in heard if isinstance(event, StoppedEarly)]
    best = lowest(losses[:end])
    assert early == (
        [StoppedEarly(end, STEPS, stop_after, best, losses[best - 1])] if end < STEPS and stop_after else []
    )
    assert told["training"] == {
        "planned_steps": STEPS,
        "steps": end,
        "kept_step": kept,
        "stopped_early": end < STEPS,
        "lengthened": [],
        "best": {"step": best, "held_out_loss": losses[best - 1]},
    }
    assert [point["step"] for point in told["losses"]["fixed"]] == [0, kept]
    assert any(f"step {end} of {STEPS}" in note for note in told["notes"]) == (end < STEPS)
    assert any(f"that of step {kept}," in note for note in told["notes"]) == keep
    assert end in stays
    assert not keep or kept in stays


WEIGHTS: dict[tuple[Path, Path], list[bytes]] = {}


def weights_of(model: Path, data: Path, output: Path, step: int) -> bytes:
    """The adapter of the same run as it is after this step, saved there by a run that neither stops nor chooses."""
    update, saved = ReferenceSession.update, WEIGHTS.setdefault((model, data), [])

    def save(self: ReferenceSession, learning_rate: float) -> None:
        update(self, learning_rate)
        self.save_adapter(folder := Path(mkdtemp(dir=output.parent)))
        saved.append((folder / Path(ADAPTER).name).read_bytes())

    if not saved:
        with patch.object(ReferenceSession, "update", save):
            run(job(model, data, load_best_model=False), output)
    return saved[step - 1]


@pytest.mark.slow
@given(st.data(), st.sampled_from([(2, True), (2, False), (None, True)]))
@examples(1 / 3)
def test_run_that_stops_or_chooses_is_the_same_wherever_it_is_killed(
    model: Path, data: Path, data_: st.DataObject, how: tuple[int | None, bool]
) -> None:
    """Dead at any event, twice, it ends at the same step with the same adapter, looks and checkpoints."""
    losses, (stop_after, keep) = data_.draw(CURVES), how
    loaded = job(model, data, early_stopping_patience=stop_after, load_best_model=keep)
    with TemporaryDirectory() as name, looks(losses):
        whole, broken = Path(name) / "whole", Path(name) / "broken"
        events = len(run(loaded, whole))
        for death in [*data_.draw(st.lists(st.integers(0, events - 1), min_size=1, max_size=2)), None]:
            if not (broken / "run.json").exists():
                run(loaded, broken, death=death)
        expected, found = ended(whole), ended(broken)
        assert (whole / ADAPTER).read_bytes() == (broken / ADAPTER).read_bytes()
        places = [sorted(path.name for path in (one / "checkpoints").iterdir()) for one in (whole, broken)]
        assert places[0] == places[1]
    for part in ("training", "losses", "scores", "verdicts", "data"):
        assert found[part] == expected[part]


def test_run_whose_best_checkpoint_is_gone_is_not_gone_on_with(model: Path, data: Path, tmp_path: Path) -> None:
    """Without the checkpoint of the best step a resume is refused before anything is done, and says which is gone."""
    losses = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    with looks(losses):
        events = run(job(model, data), tmp_path / "run")
        place = next(number for number, event in enumerate(events) if isinstance(event, StepDone) and event.step == 7)
        run(job(model, data), tmp_path / "again", death=place)
        (tmp_path / "again" / "checkpoints" / "step-00000002" / "checkpoint.json").unlink()
        before = (tmp_path / "again" / "events.jsonl").read_bytes()
        with pytest.raises(RefusedError, match="best step so far, 2, is gone") as caught:
            run(job(model, data), tmp_path / "again")
        assert caught.value.hint
        assert (tmp_path / "again" / "events.jsonl").read_bytes() == before


def test_shuffled_label_control_takes_the_steps_of_the_adapter(model: Path, data: Path, tmp_path: Path) -> None:
    """A run that keeps step 3 of 8 is compared with what 3 steps on shuffled rows make, at the same learning rates."""
    done: dict[str, list[Any]] = {}

    def note(name: str) -> Any:
        plain = getattr(ReferenceSession, name)

        def noted(self: ReferenceSession, *given_: Any) -> Any:
            done.setdefault(name, []).append((self, given_[0]))
            return plain(self, *given_)

        return patch.object(ReferenceSession, name, noted)

    with looks([3.0, 2.0, 1.0] + [2.0] * 5), note("attach"), note("update"), note("accumulate"), note("generate"):
        loaded = job(model, data, early_stopping_patience=2)
        judged = loaded.config.judge.model_copy(update={"control": "always"})
        loaded = LoadedConfig(loaded.config.model_copy(update={"judge": judged}), loaded.origins)
        run(loaded, tmp_path / "run")
    adapter, control = (session for session, _ in done["attach"])
    rates = {session: [rate for one, rate in done["update"] if one is session] for session in (adapter, control)}
    assert len(rates[adapter]) == 5
    assert rates[control] == rates[adapter][:3]
    rows = {row.ids for session, batch in done["accumulate"] if session is control for row in batch.rows}
    assert rows == {row.ids for row in shuffled_label_rows(prepare(loaded), {}) or ()}
    assert rows != {row.ids for row in prepare(loaded).training_rows}
    assert done["generate"][-1][0] is control


def test_report_tells_the_losses_of_the_step_that_is_kept(model: Path, data: Path, tmp_path: Path) -> None:
    """The held-out loss after training is that of the kept step, and page and report say that training stopped."""
    losses = [3.0, 2.0, 1.0, 2.0, 2.5, 9.0, 9.0, 9.0]
    with looks(losses):
        run(job(model, data, early_stopping_patience=2), tmp_path / "run")
    record = ended(tmp_path / "run")
    report = build_report(record)
    assert report["headline"]["held_out_loss"]["after"] == 1.0
    assert report["training"]["kept_step"] == report["headline"]["kept_step"] == 3
    page = render_html([{**record, "losses": {}, "scores": None}])  # without charts
    assert "stopped early, at step 5 of 8" in page
    assert "the adapter is that of step 3" in page


@pytest.mark.parametrize("keep", [False, True])
def test_run_judges_only_the_steps_that_made_the_adapter(keep: bool, model: Path, data: Path, tmp_path: Path) -> None:
    """Steps after the one that is kept are no evidence: a best step 1 has one step, and the last has them all."""
    with looks([1.0] + [2.0] * (STEPS - 1)):
        run(job(model, data, load_best_model=keep), tmp_path / "run")
    record = ended(tmp_path / "run")
    [verdict] = [one for one in record["verdicts"] if one["id"] == "loss-convergence"]
    assert (verdict["measured"] == "1 step") == keep
    assert len(record["losses"]["train"]) == STEPS
    assert all(math.isfinite(point["loss"]) for point in record["losses"]["train"])
