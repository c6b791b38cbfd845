"""Laws of advice: each piece follows from the illness that was measured, and a healthy run gets none."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.chat.fit import DataCounts
from finetune.criteria.advice import RunFacts, advise
from finetune.criteria.evidence import Evidence, LossEvidence
from finetune.criteria.judge import judge
from finetune.train import fine_tune
from support.evidence import healthy, scores
from support.open_evidence import NULL_KINDS, evidence, matching, shifted
from support.workplace import make_data, make_model, settings, without_reload_check

FACTS = RunFacts(DataCounts(100, 100, {}, 0, 9_000, 3_000), 1e-3, 1e-3, 40, 16)


def advice_on(found: Evidence, **changes: Any) -> tuple[str, ...]:
    """What is advised after this evidence."""
    return advise(found, judge(found), dataclasses.replace(FACTS, **changes))


def loss(after: float, steps: int = 60) -> LossEvidence:
    """From 4 nats to so many in so many steps."""
    return LossEvidence(tuple([4.0] * (steps - 1) + [after]), 4.0, after, 512, 4.2, 3.9)


@pytest.mark.parametrize("found", [healthy(), healthy(learning=None, open=evidence())], ids=["exact", "open"])
def test_healthy_run_gets_no_advice(found: Evidence) -> None:
    """There is nothing to try after a run without a fault."""
    assert advice_on(found) == ()


IDLE = healthy().learning
ILLNESSES: dict[str, tuple[Evidence, dict[str, Any], str]] = {
    "rows dropped": (
        healthy(),
        {"counts": DataCounts(100, 80, {"longer than 64 tokens": 20}, 0, 9, 9)},
        "20.0% of the rows are dropped (20 of 100)",
    ),
    "no unseen rows": (healthy(learning=None, open=evidence(goal="rows")), {"unseen": 3}, "3 unseen rows"),
    "known before": (
        healthy(
            learning=None, loss=loss(3.9), open=evidence(rows=matching(30, 31), losses=shifted((2.0,) * 32, -0.01))
        ),
        {},
        "94% of these rows",
    ),
    "known before, exact": (
        healthy(learning=dataclasses.replace(IDLE, base=scores(18), tuned=scores(19))),  # type: ignore[type-var]
        {},
        "90% of these rows right already",
    ),
    "too few steps": (
        healthy(learning=None, loss=loss(3.7, steps=6), open=evidence(rows=matching(12, 12))),
        {},
        "in 6 steps: train longer",
    ),
    "rate too low": (
        healthy(learning=None, loss=loss(3.9), open=evidence(rows=matching(12, 12))),
        {"learning_rate": 1e-6},
        "raise training.learning_rate (it is 1e-06; 0.001 is usual for this size)",
    ),
    "rate too low and few steps": (
        healthy(learning=None, loss=loss(3.9, steps=6), open=evidence(rows=matching(12, 12))),
        {"learning_rate": 1e-6},
        "0.001 is usual for this size",
    ),
    "not learned at a usual rate": (
        healthy(learning=None, loss=loss(3.9), open=evidence(rows=matching(12, 12))),
        {},
        "at a usual learning rate in 60 steps: train longer",
    ),
    "loss fell, answers wrong": (
        healthy(learning=dataclasses.replace(IDLE, base=scores(0), tuned=scores(3))),  # type: ignore[type-var]
        {},
        "15% of the answers are right: train longer (training.epochs)",
    ),
    "forgot": (
        healthy(learning=None, open=evidence(**NULL_KINDS["forgot"][0])),
        {},
        "lower training.learning_rate (it is 0.001) or training.epochs",
    ),
    "forgot, too fast": (
        healthy(learning=None, open=evidence(**NULL_KINDS["forgot"][0])),
        {"learning_rate": 5e-3},
        "(it is 0.005; 0.001 is usual for this size)",
    ),
    "recites": (healthy(learning=None, open=evidence(**NULL_KINDS["memorised"][0])), {}, "recites its rows"),
    "no end": (healthy(learning=None, open=evidence(**NULL_KINDS["no end of answer"][0])), {}, "answers do not end"),
    "wrong base": (healthy(loss=LossEvidence((9.0, 8.9, 8.8), 12.0, 11.0, 512)), {}, "check model.path"),
}


@pytest.mark.parametrize("illness", ILLNESSES)
def test_illness_gets_its_advice(illness: str) -> None:
    """What was measured is named, with the setting that would change it."""
    found, changes, words = ILLNESSES[illness]
    assert any(words in each for each in advice_on(found, **changes)), advice_on(found, **changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, exact and open rows."""
    folder = tmp_path_factory.mktemp("ill")
    make_model(folder / "model")
    make_data(folder / "exact.jsonl", 12)
    rows = [{"prompt": f"of {n}", "completion": " ".join(f"{n}{k}" for k in range(9))} for n in range(12)]
    (folder / "open.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


RUNS: dict[str, tuple[str, dict[str, Any], str]] = {
    "rows dropped": ("exact", {"tokens__max_length": 48}, "of the rows are dropped"),
    "no held-out rows": ("open", {"training__epochs": 1.0}, "0 unseen rows were held out"),
    "too few steps": ("open", {"training__max_steps": 2}, "in 2 steps: train longer"),
    "rate too low": (
        "open",
        {"training__learning_rate": 1e-6, "training__max_steps": 2},
        "raise training.learning_rate (it is 1e-06; 0.005 is usual for this size)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("illness", RUNS)
def test_run_with_the_illness_is_told(place: Path, tmp_path: Path, illness: str) -> None:
    """A run that was made ill on purpose is advised so, in its run.json."""
    data, changes, words = RUNS[illness]
    with without_reload_check():
        _, record = fine_tune(settings(place / "model", place / f"{data}.jsonl", **changes), output=tmp_path / "run")
    assert any(words in each for each in record["advice"]), record["advice"]
