"""Judges preferences: whether chosen answers gained on rejected ones, in unseen pairs too, and stayed likely."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from finetune.criteria.claims import EFFECT_FLOOR, LEVEL, OWN_MARGIN, Moves, rows_needed
from finetune.criteria.evidence import FEWEST_PAIRS, Paired, PreferenceEvidence
from finetune.criteria.verdicts import NOT_MEASURED, verdict
from finetune.errors import EvidenceError
from finetune.intervals import chance_of_at_least, mean_interval, wilson_interval
from finetune.records import Outcome, Verdict

_NOT_ASKED = {
    "loss-start": "the loss of a pair begins at ln 2 whatever the base is",
    "claim-rows": "a chosen answer is to gain on the rejected one, and need not get likelier than others' answers",
    "claim-unseen": "a chosen answer is to gain on the rejected one, and need not get likelier itself",
    "claim-association": "unseen pairs show whether anything carries over",
}
_ABOVE = f"more than half of the pairs gained more than there, by chance at most {LEVEL:.0%}"
_GAINED = f"more than half of the pairs, by chance at most {LEVEL:.0%}"


def of_pairs(found: Verdict) -> Verdict:
    """A verdict as it stands where rows are pairs: not applicable where it asks what pairs do not teach."""
    if found.id not in _NOT_ASKED:
        return found
    asked_not = verdict(found.id, Outcome.NOT_APPLICABLE, NOT_MEASURED, "", _NOT_ASKED[found.id])
    return replace(asked_not, counts=False)


def judge_preference(evidence: PreferenceEvidence) -> list[Verdict]:
    """A verdict on training pairs, on unseen ones, on a control of flipped pairs, and on the chosen answers alone.

    Raises:
        EvidenceError: a number is not finite.
    """
    chosen = evidence.chosen
    control = evidence.control
    flipped = (*control.found, *(control.tuned or ())) if control else ()
    if not all(map(math.isfinite, (*evidence.rows, *evidence.unseen, *chosen.base, *chosen.tuned, *flipped))):
        raise EvidenceError("log p of a pair is not a finite number: nothing can be judged by it")
    return [
        _judge_gains("preference-rows", evidence.rows, evidence.beta),
        _judge_unseen(evidence),
        _judge_control(evidence),
        _judge_chosen(chosen),
    ]


def gains_of(gains: Sequence[float], beta: float) -> Moves:
    """How many pairs gained, as losses that fall; beside 1 / beta, the scale of their loss, a trifle does not count."""
    return Moves.of(Paired((0.0,) * len(gains), tuple(-gain for gain in gains)), EFFECT_FLOOR / beta)


def _judge_gains(key: str, gains: tuple[float, ...], beta: float) -> Verdict:
    """The sign test over pairs."""
    moves = gains_of(gains, beta)
    low, high = wilson_interval(moves.fell, moves.count)
    measured = (
        f"{moves.fell} of {moves.count} pairs by more than {moves.floor:.2g} nats, "
        f"{moves.fell / moves.count:.0%} [{low:.0%}, {high:.0%}]; {-moves.mean:+.3g} nats on average"
    )
    if spread := mean_interval(gains):
        measured += f" [{spread[0]:.3g}, {spread[1]:.3g}]"
    reason = ""
    if moves.outcome == Outcome.INCONCLUSIVE:
        enough = rows_needed(moves)
        reason = f"{moves.count} pairs are too few to tell" + (f"; about {enough} would do" if enough else "")
    numbers = {"gained": moves.fell, "lost": moves.rose, "count": moves.count, "mean": -moves.mean}
    numbers |= {"floor": moves.floor, "low": low, "high": high}
    return replace(verdict(key, moves.outcome, measured, _GAINED, reason), numbers=numbers)


def _judge_unseen(evidence: PreferenceEvidence) -> Verdict:
    key, count = "preference-unseen", len(evidence.unseen)
    if not count:
        reason = "no pair was held out that training does not repeat"
        return replace(verdict(key, Outcome.INCONCLUSIVE, NOT_MEASURED, _GAINED, reason), counts=False)
    found = _judge_gains(key, evidence.unseen, evidence.beta)
    before, now = map(sum, evidence.liked)
    measured = f"{found.measured}; the chosen answer is the likelier one in {before}, then {now}"
    numbers = {**found.numbers, "likelier before": before, "likelier after": now}
    return replace(found, measured=measured, numbers=numbers, counts=count >= FEWEST_PAIRS)


def _judge_control(evidence: PreferenceEvidence) -> Verdict:
    """The same pairs changed round must teach the opposite; what does not is no preference, but a habit of its own."""
    key, control = "preference-control", evidence.control
    if control is None:
        found = verdict(key, Outcome.INCONCLUSIVE, NOT_MEASURED, _ABOVE, evidence.why_no_control)
        return replace(found, counts=False)
    tuned = control.tuned or evidence.compared
    beyond = [own - other for own, other in zip(tuned, control.found, strict=True)]
    moves = gains_of(beyond, evidence.beta)
    measured = (
        f"{moves.fell} of {moves.count} pairs by more than {moves.floor:.2g} nats; {fmean(tuned):+.3g} nats on "
        f"average, the control {fmean(control.found):+.3g}"
    )
    short = f"both after {control.steps} steps, as many of a control as judge.budget allows" if control.tuned else ""
    numbers = {"above": moves.fell, "below": moves.rose, "count": moves.count, "mean": -moves.mean}
    return replace(verdict(key, moves.outcome, measured, _ABOVE, short), numbers=numbers)


def _judge_chosen(chosen: Paired) -> Verdict:
    """Both answers of a pair may lose, the chosen one less: beyond a margin that is a collapse, and no preference."""
    moves = Moves.of(chosen, OWN_MARGIN)
    allowed = f"most at most {OWN_MARGIN:g} nats per token less likely, by chance at most {LEVEL:.0%}"
    outcome, reason = Outcome.INCONCLUSIVE, "a collapse is neither shown nor excluded"
    if chance_of_at_least(moves.rose, moves.count) <= LEVEL:
        outcome, reason = Outcome.FAILED, "chosen answers became unlikely, and rejected ones more so"
    elif chance_of_at_least(moves.count - moves.rose, moves.count) <= LEVEL:
        outcome, reason = Outcome.PASSED, ""
    measured = (
        f"{fmean(chosen.base):.3g} to {fmean(chosen.tuned):.3g} nats per token; {moves.rose} of {moves.count} "
        f"beyond {moves.floor:g}"
    )
    return verdict(
        "preference-chosen", outcome, measured, allowed, reason, harmed=moves.rose, count=moves.count, mean=moves.mean
    )
