"""Laws of what a step minimises: the formula, how a step divides it, and that a wrong one is noticed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.backends.reference import session as reference
from finetune.config import load_config
from finetune.events import StepDone
from finetune.objectives import choose_objective
from finetune.objectives.cross_entropy import CROSS_ENTROPY, CrossEntropy
from finetune.records import Batch, TokenizedRow
from finetune.training.loop import LoopPlan, train
from finetune_strategies.datasets import token_rows
from finetune_strategies.profiles import examples
from support.objectives import PREFERENCE
from support.tiny_llamas import ROWS, adapted, check_slopes
from support.toy_session import ToySession

SHARES = st.sampled_from([0.0, 0.1, 0.5, 0.99])


def smoothed_by_hand(session: Any, rows: tuple[TokenizedRow, ...], share: float) -> float:
    """The sum over trained tokens of (1 - share) x its surprise + share x the mean surprise of all words."""
    total = 0.0
    for row in rows:
        for place, logits in enumerate(session.logits(row.ids)[:-1], start=1):
            if row.trained[place]:
                surprise = -np.log(np.exp(logits) / np.exp(logits).sum())
                total += (1 - share) * surprise[row.ids[place]] + share * surprise.mean()
    return total


def check_smoothing(share: float, rows: tuple[TokenizedRow, ...] = ROWS[:2]) -> None:
    """Loss and gradient with label smoothing are those of the formula, also where rows share a sequence."""
    session, objective = adapted(trained=True), CrossEntropy(share)
    wanted = smoothed_by_hand(session, rows, share)
    for batch in (Batch(rows), Batch(rows, (len(rows),))):
        assert session.loss(batch, objective) == pytest.approx(wanted, rel=1e-9)
        assert session.accumulate(batch, 1.0, objective) == pytest.approx(wanted, rel=1e-9)
    check_slopes(session, Batch(rows), objective)


@given(token_rows(1, 3), SHARES)
@examples(1 / 5)
def test_label_smoothing_is_its_formula(rows: tuple[TokenizedRow, ...], share: float) -> None:
    """A share of each target goes to all words alike, in the loss and in its gradient."""
    check_smoothing(share, rows)


def _wrong(change: Callable[[Any, Any, float], tuple[Any, Any]]) -> Callable[..., Any]:
    right = reference.cross_entropy
    return lambda logits, targets, share=0.0: change(right(logits, targets, share), right(logits, targets), share)


FAULTS = {
    "not smoothed": lambda found, plain, share: plain,
    "gradient not smoothed": lambda found, plain, share: (found[0], plain[1]),
    "the right word keeps all": lambda found, plain, share: (found[0] + share * plain[0], found[1]),
    "spread over the other words": lambda found, plain, share: (found[0] + share / 97 * plain[0], found[1]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_label_smoothing_that_is_wrong_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 4 ways to smooth wrongly breaks the law above."""
    monkeypatch.setattr(reference, "cross_entropy", _wrong(FAULTS[fault]))
    with pytest.raises(AssertionError):
        check_smoothing(0.1)


def test_step_is_divided_by_the_units_of_its_objective() -> None:
    """What a step tells and learns is the sum over its batches, divided by their units together."""
    window = [Batch(ROWS[:4]), Batch(ROWS[4:6])]
    for objective, units in ((CROSS_ENTROPY, sum(batch.target_count for batch in window)), (PREFERENCE, 3)):
        session = ToySession()
        plan = LoopPlan(1, 2, 0.1, 0, "constant", 9, objective=objective)
        [done] = [event for event in train(session, lambda epoch: window, (), plan) if isinstance(event, StepDone)]  # type: ignore[arg-type]
        assert [weight for _, weight in session.called("accumulate")] == [1 / units] * 2
        assert done.loss == pytest.approx(sum(map(ToySession()._summed, window)) / units)
        assert done.trained_tokens == sum(batch.target_count for batch in window)


@given(SHARES)
def test_objective_is_the_one_that_is_set(share: float) -> None:
    """`training.label_smoothing` reaches the objective; left out it is plain cross-entropy."""
    given = {"training.label_smoothing": share} if share else {}
    config = load_config(None, environ={}, overrides=given, profile=None).config
    assert choose_objective(config.training, ToySession(), ()) == CrossEntropy(share)
