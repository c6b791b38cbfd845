"""Laws of what judging may cost: counted, kept to and told; a shortened control meets its equal."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune import train as training
from finetune.abilities import Abilities
from finetune.backends import open_backend
from finetune.backends.reference.session import ReferenceSession
from finetune.config import LoadedConfig, load_config
from finetune.criteria.evidence import ControlEvidence
from finetune.events import Event
from finetune.evidence import collect, extra_runs
from finetune.evidence.asked import FEWEST_MATCHED, FEWEST_ROWS, Asked, what_to_ask
from finetune.evidence.budget import LOOKS
from finetune.evidence.observe import observe
from finetune.training.prepare import prepare
from finetune_strategies.profiles import examples
from properties.test_open_answers import loaded as open_run
from properties.test_open_answers import place
from support.evidence import altered, scores, verdicts_on
from support.workplace import ended, run, settings

__all__ = ["place"]
STEPS, SHORT = 8, 3


@pytest.fixture(autouse=True)
def nothing_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judging has its share of the training and no more; processes cost nothing, as tiny models have none to spare."""
    monkeypatch.setattr("finetune.evidence.budget.FREE", 0.0)
    monkeypatch.setattr("finetune.evidence.budget._PROCESS", 0.0)


def job(model: Path, data: Path, **changes: Any) -> LoadedConfig:
    """Eight steps that change every answer."""
    fast = {"training__max_steps": STEPS, "training__epochs": 99.0, "training__learning_rate": 0.3}
    return settings(model, data, **{**fast, "judge__control": "auto", "training__save_every": 99, **changes})


def share_for(model: Path, data: Path, steps: float) -> float:
    """The budget that leaves the control so many steps."""
    found = what_to_ask(prepare(job(model, data))).budget
    return (found.looks + found.control(0) + (steps + 0.5) * found.step) / (found.steps * found.step)


@given(st.floats(1e-3, 1e3))
@examples(1 / 4)
def test_looks_fit_the_budget_or_are_as_small_as_a_verdict_allows(place: Path, share: float) -> None:
    """Asked is what fits, at least 16 rows of a kind, and more never for less; the same every time."""
    found, again, richer = (
        what_to_ask(prepare(open_run(place, judge__budget=each, data__valid_fraction=None)))  # type: ignore[arg-type]
        for each in (share, share, 2 * share)
    )
    assert found == again
    fits = found.budget.looks <= LOOKS * found.budget.allowed
    kinds, more = sizes(found), sizes(richer)
    assert fits or (kinds[0] <= FEWEST_MATCHED and max(kinds[1:]) <= FEWEST_ROWS)
    assert all(few <= many for few, many in zip(kinds, more, strict=True))
    assert min(kinds[1:]) >= FEWEST_ROWS
    assert found.budget.allowed == pytest.approx(share * found.budget.steps * found.budget.step)


def sizes(found: Asked) -> list[int]:
    """How many rows of each kind are asked."""
    assert found.open is not None
    assert found.open.rows is not None
    return [len(each) for each in (found.open.rows.own, found.open.unseen, found.open.text, found.open.prompts)]


def test_what_is_asked_costs_what_was_said(place: Path) -> None:
    """Each token that a whole pair of looks scores or says is paid for: counted at the sessions, it is no more."""
    prepared = prepare(open_run(place, judge__budget=1e3))  # type: ignore[arg-type]
    found = what_to_ask(prepared)
    scored = 0
    loss = ReferenceSession.loss

    def count(self: ReferenceSession, batch: Any, *rest: Any) -> float:
        nonlocal scored
        scored += batch.token_count
        return loss(self, batch, *rest)

    session = open_backend("reference").open(prepared.location, "float32", prepared.encoder.tokenizer.pad_id)
    with patch.object(ReferenceSession, "loss", count):
        base = observe(session, prepared)
        observe(session, prepared, base)
    assert scored / 2 <= found.budget.looks
    assert scored > found.budget.looks / 10


@pytest.fixture(scope="module")
def shortened(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedConfig, Path]:
    """A run whose control has three steps of eight, and its configuration."""
    output = tmp_path_factory.mktemp("short") / "run"
    with patch("finetune.evidence.budget.FREE", 0.0), patch("finetune.evidence.budget._PROCESS", 0.0), able():
        loaded = job(model, data, judge__budget=share_for(model, data, SHORT))
        run(loaded, output)
    return loaded, output


def able() -> Any:
    """Within this context any model has learned enough for a control to be worth its while."""
    return patch.object(collect, "could_pass", lambda tuned: True)


def test_shortened_control_is_compared_at_its_own_step(
    shortened: tuple[LoadedConfig, Path], model: Path, data: Path, tmp_path: Path
) -> None:
    """Beside it stand the answers of the tuned model after as many steps, and not those of the final one."""
    record = ended(shortened[1])
    found = record["scores"]["learning"]
    plain = training.training_events

    def cut(*given_: Any, **named: Any) -> Iterator[Event]:
        return plain(*given_, **{**named, "last": SHORT})

    with patch.object(training, "training_events", cut):
        run(job(model, data, judge__control="never"), tmp_path / "cut")
    then = ended(tmp_path / "cut")["scores"]["learning"]["tuned"]
    assert found["control"]["steps"] == SHORT == record["judging"]["tokens"]["control_steps"]
    assert found["control"]["tuned"] == then
    assert found["control"]["tuned"]["answers"] != found["tuned"]["answers"]
    [verdict] = [one for one in record["verdicts"] if one["id"] == "learning-control"]
    assert f"after {SHORT} steps" in verdict["reason"]


@pytest.mark.slow
def test_same_seed_gives_the_same_verdict_wherever_it_is_killed(shortened: tuple[LoadedConfig, Path]) -> None:
    """Dead at any event and resumed, a run with a shortened control has the same scores, checkpoints and verdicts."""
    loaded, whole = shortened
    with able(), TemporaryDirectory() as name:
        for death in (1, 6, 9, 16, 24, 26):
            broken = Path(name) / str(death)
            run(loaded, broken, death=death)
            if not (broken / "run.json").exists():
                run(loaded, broken)
            found, expected = ended(broken), ended(whole)
            for part in ("scores", "verdicts", "losses"):
                assert found[part] == expected[part], death
            places = [sorted(path.name for path in (one / "checkpoints").iterdir()) for one in (whole, broken)]
            assert places[0] == places[1]


def test_control_without_its_checkpoint_is_not_compared_with_another_step(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """Where the checkpoint is gone nothing is trained or compared, and the price is told; of an earlier one it is."""
    loaded = job(model, data, judge__budget=share_for(model, data, SHORT))
    with able(), patch.object(training, "_control_checkpoint", lambda *given_: 0):
        run(loaded, tmp_path / "run")
    assert ended(tmp_path / "run")["scores"]["learning"]["control"] is None
    assert "judge.budget" in ended(tmp_path / "run")["not_measured"]["control"]
    with able(), patch.object(training, "_control_checkpoint", lambda *given_: SHORT - 1):
        run(loaded, tmp_path / "other")
    assert ended(tmp_path / "other")["scores"]["learning"]["control"]["steps"] == SHORT - 1


@pytest.mark.parametrize("steps", [0.0, float(SHORT)])
def test_control_that_does_not_fit_is_inconclusive_with_its_price(
    steps: float, model: Path, data: Path, tmp_path: Path
) -> None:
    """Neither a step that the budget lacks nor one on which nothing could be seen is taken, and both are told."""
    attached: list[int] = []
    attach = ReferenceSession.attach
    loaded = job(model, data, judge__budget=share_for(model, data, steps))
    with patch.object(ReferenceSession, "attach", lambda *given_: (attached.append(1), attach(*given_))[1]):
        run(loaded, tmp_path / "run")
    assert len(attached) == 1
    [verdict] = [one for one in ended(tmp_path / "run")["verdicts"] if one["id"] == "learning-control"]
    assert verdict["outcome"] == "inconclusive"
    assert "it would cost " in verdict["reason"]
    assert "(judge.budget)" in verdict["reason"]
    assert ("had not yet learned" in verdict["reason"]) == bool(steps)
    run(loaded, tmp_path / "again")  # the price is counted: another time, at another pace, the same is said
    assert verdict in ended(tmp_path / "again")["verdicts"]


def test_control_is_whole_where_it_fits_or_is_asked_for(model: Path, data: Path, tmp_path: Path) -> None:
    """With budget enough, and always with always, it takes the steps of the run, and meets the final model."""
    for name, changes in (("rich", {"judge__budget": 1e3}), ("always", {"judge__control": "always"})):
        run(job(model, data, **changes), tmp_path / name)
        found = ended(tmp_path / name)["scores"]["learning"]["control"]
        assert found["steps"] == STEPS
        assert "tuned" not in found


def test_judge_holds_a_shortened_control_against_its_equal() -> None:
    """Better than a control that had a tenth of its steps is no proof; as long as neither has learned, nothing is."""
    for control, then, outcome in (
        (1, 2, "inconclusive"),
        (1, 18, "passed"),
        (5, 19, "failed"),
        (0, 0, "inconclusive"),
    ):
        short = ControlEvidence(scores(control), 3, scores(then))
        verdict = verdicts_on(altered("learning", control=short, tuned=scores(20)))["learning-control"]
        assert verdict.outcome == outcome
        assert "3 steps" in verdict.reason


def test_memory_is_never_measured_where_it_would_not_fit(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full fine-tuning beyond the free memory, or measurements beyond the budget, are refused with their figures."""
    prepared = prepare(settings(model, data, judge__memory="always"))
    before: Any = type("Look", (), {"asked": what_to_ask(prepared)})
    assert extra_runs.why_no_memory(prepared, before, able=True) == ""
    monkeypatch.setattr(extra_runs, "available_memory", lambda: 3 * 1024**2)
    reason = extra_runs.why_no_memory(prepared, before, able=True)
    assert "3.00 MiB are free" in reason
    monkeypatch.setattr("finetune.evidence.budget.ABILITIES", {"reference": Abilities(memory=True)})
    dear = prepare(settings(model, data, judge__memory="auto", judge__budget=1e-3))
    before.asked = what_to_ask(dear)
    reason = extra_runs.why_no_memory(dear, before, able=True)
    assert "it would cost " in reason
    assert "(judge.budget)" in reason


def test_free_work_lets_the_shipped_models_have_all_their_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demonstration's control has all its steps, its memory is measured, and every question is asked."""
    monkeypatch.undo()
    for name in ("reference-llama", "reference-gpt2"):
        prepared = prepare(load_config(None, environ={}, overrides={"model.path": name}, profile="demo"))
        found = what_to_ask(prepared)
        assert found.budget.memory_fits
        assert found.budget.control_steps == prepared.total_steps
        assert found.learning == prepared.questions
