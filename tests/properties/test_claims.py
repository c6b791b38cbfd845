"""Laws of the verdict on open answers: error rates, floors, and the four kinds of runs that rival tools misjudge."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.criteria.claims import EFFECT_FLOOR, GOALS, LEVEL, Moves, judge_claims
from finetune.criteria.evidence import OpenEvidence, Paired
from finetune.criteria.judge import overall
from finetune.errors import EvidenceError
from finetune.intervals import most_probable
from finetune.records import Outcome, Verdict
from support.open_evidence import NULL_KINDS, ROWS, evidence, matching, shifted

LOSSES = st.floats(0.05, 8.0)


def verdicts(found: OpenEvidence) -> dict[str, Verdict]:
    """The verdicts by id."""
    return {each.id: each for each in judge_claims(found)}


def headline(found: OpenEvidence) -> Outcome:
    """What the claims come to."""
    return overall(tuple(judge_claims(found)))


def test_run_that_learned_passes() -> None:
    """With an effect as measured on a real run of 64 unseen rows, every claim that counts holds."""
    assert headline(evidence()) == Outcome.PASSED


@pytest.mark.parametrize("kind", NULL_KINDS)
def test_run_of_a_null_kind_fails_by_its_claim(kind: str) -> None:
    """Nothing, shuffled labels, forgetting, reciting, endless answers: each fails by what is wrong with it."""
    parts, claim = NULL_KINDS[kind]
    assert verdicts(evidence(**parts))[claim].outcome == Outcome.FAILED
    assert headline(evidence(**parts)) == Outcome.FAILED


@pytest.mark.parametrize(
    ("still", "moved", "outcome"),
    [
        (24, -1.5, Outcome.PASSED),
        (20, -1.5, Outcome.INCONCLUSIVE),
        (12, -1.5, Outcome.FAILED),  # likelier, yet told from others' answers no more: as shuffled labels do
        (24, -1e-4, Outcome.FAILED),
    ],
)
def test_base_that_tells_all_own_answers_leaves_their_loss_to_be_judged(
    still: int, moved: float, outcome: Outcome
) -> None:
    """None can be gained then: own answers must get likelier, and must still be told from others'."""
    found = evidence(rows=matching(24, still, 24), losses=shifted(ROWS[:24], moved))
    assert verdicts(found)["claim-rows"].outcome == outcome


def test_too_few_rows_are_inconclusive_and_say_how_many_would_do() -> None:
    """Six unseen rows, five of them likelier: no verdict, and the number of rows that would settle it."""
    found = evidence(unseen=Paired(ROWS[:6], (*(loss - 0.5 for loss in ROWS[:5]), ROWS[5] + 0.5)))
    assert verdicts(found)["claim-unseen"].outcome == Outcome.INCONCLUSIVE
    assert "would do" in verdicts(found)["claim-unseen"].reason
    assert headline(found) == Outcome.INCONCLUSIVE


@given(st.lists(LOSSES, min_size=1, max_size=80).map(tuple), st.floats(-0.99, 0.99))
def test_shift_below_the_floor_is_no_evidence(base: tuple[float, ...], share: float) -> None:
    """However many rows there are: a shift smaller than the floor passes no claim of learning."""
    floor = EFFECT_FLOOR * sum(base) / len(base)
    moves = Moves.of(Paired(base, tuple(loss + share * floor for loss in base)), floor)
    assert (moves.fell, moves.rose) == (0, 0)
    assert moves.outcome != Outcome.PASSED


@given(st.lists(st.tuples(LOSSES, LOSSES), min_size=1, max_size=80), st.data())
def test_claim_is_monotone(pairs: list[tuple[float, float]], data: st.DataObject) -> None:
    """A run whose rows are all likelier than another's never has the worse verdict."""
    base, tuned = zip(*pairs, strict=True)
    gain = data.draw(st.floats(0, 3))
    order = [Outcome.FAILED, Outcome.INCONCLUSIVE, Outcome.PASSED]
    one = Moves.of(Paired(base, tuned), 0.05)
    other = Moves.of(Paired(base, tuple(loss - gain for loss in tuned)), 0.05)
    assert order.index(other.outcome) >= order.index(one.outcome)


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 24, 64])
def test_claim_errs_as_rarely_as_it_says(count: int) -> None:
    """Of 4,000 runs that move rows at random, the share that passes can be no more than the stated level."""
    passed = 0
    for seed in range(4_000):
        base = (2.0,) * count
        passed += Moves.of(shifted(base, 0.0, 0.5, seed), 0.0).outcome == Outcome.PASSED
    assert passed / 4_000 <= LEVEL or most_probable(4_000 - passed, 4_000) > 1 - LEVEL


@given(st.sampled_from(sorted(GOALS)), st.sampled_from(sorted(NULL_KINDS)))
def test_headline_counts_the_claims_of_its_goal_alone(goal: str, kind: str) -> None:
    """A claim that the goal does not need is shown and never decides."""
    found = judge_claims(evidence(goal=goal, **NULL_KINDS[kind][0]))
    needed = {*GOALS[goal], "claim-retention", "claim-ends"}
    assert {each.id for each in found if each.counts} == needed
    assert len(found) == 6


def test_base_that_knows_nothing_of_neutral_text_can_lose_nothing() -> None:
    """A base as good as a uniform guess there gives no verdict on forgetting, and says so."""
    blind = shifted((10.7,) * 16, 5.0)
    sure = shifted((0.2,) * 16, 3.0)  # its own answers to what it cannot read are noise, however sure it is of them
    found = verdicts(evidence(text=blind, own_answers=sure, right=((False,) * 27,) * 2))["claim-retention"]
    assert found.outcome == Outcome.INCONCLUSIVE
    assert "too little" in found.reason


@pytest.mark.parametrize(
    ("known", "kept", "outcome"),
    [(36, 36, Outcome.PASSED), (36, 30, Outcome.INCONCLUSIVE), (9, 9, Outcome.INCONCLUSIVE), (36, 12, Outcome.FAILED)],
)
def test_questions_alone_show_that_nothing_is_lost_only_when_chance_is_excluded(
    known: int, kept: int, outcome: Outcome
) -> None:
    """Where questions are all there is, keeping them must be shown, not merely losing them not be shown."""
    right = (True,) * known, (True,) * kept + (False,) * (known - kept)
    found = verdicts(evidence(text=Paired((), ()), own_answers=Paired((), ()), right=right))["claim-retention"]
    assert found.outcome == outcome


@pytest.mark.parametrize("part", ["losses", "unseen", "text", "own_answers"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_no_number_is_never_judged(part: str, bad: float) -> None:
    """One loss that is not finite, in any part: an error that names it."""
    pair = getattr(evidence(), part)
    with pytest.raises(EvidenceError, match=part.replace("_", " ")):
        judge_claims(evidence(**{part: Paired(pair.base, (*pair.tuned[:-1], bad))}))
