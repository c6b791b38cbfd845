"""Laws of advice: each piece follows from the illness that was measured, and a healthy run gets none."""

import dataclasses
from typing import Any

import pytest

from finetune.criteria.advice import RunFacts, advise
from finetune.criteria.evidence import Evidence, LossEvidence
from finetune.criteria.judge import judge
from finetune.records import DataCounts
from support.evidence import healthy, scores
from support.open_evidence import NULL_KINDS, evidence, matching

FACTS = RunFacts(DataCounts(100, 100, {}, 0, 9_000, 3_000), 2e-4, 40, 16)


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
        "20 of 100 rows",
    ),
    "no unseen rows": (healthy(learning=None, open=evidence(goal="rows")), {"unseen": 3}, "3 unseen rows"),
    "known before": (
        healthy(learning=None, open=evidence(rows=matching(30, 31))),
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
        "raise training.learning_rate (it is 1e-06",
    ),
    "forgot": (healthy(learning=None, open=evidence(**NULL_KINDS["forgot"][0])), {}, "forgot what its base knew"),
    "recites": (healthy(learning=None, open=evidence(**NULL_KINDS["memorised"][0])), {}, "recites its rows"),
    "no end": (healthy(learning=None, open=evidence(**NULL_KINDS["no end of answer"][0])), {}, "answers do not end"),
    "wrong base": (healthy(loss=LossEvidence((9.0, 8.9, 8.8), 12.0, 11.0, 512)), {}, "check model.path"),
}


@pytest.mark.parametrize("illness", ILLNESSES)
def test_illness_gets_its_advice(illness: str) -> None:
    """What was measured is named, with the setting that would change it."""
    found, changes, words = ILLNESSES[illness]
    assert any(words in each for each in advice_on(found, **changes)), advice_on(found, **changes)
