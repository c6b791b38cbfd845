"""Judges whether the model learned: signed, against a shuffled-label control, with intervals, without forgetting."""

import math

from finetune.criteria.evidence import Evidence, LearningEvidence
from finetune.criteria.validator import MIN_IMPROVED_SHARE, TrainingSuccessValidator
from finetune.criteria.verdicts import NOT_MEASURED, too_few_left, verdict
from finetune.errors import counted
from finetune.intervals import difference_interval, wilson_interval
from finetune.records import Outcome, Scores, Verdict

MAX_CONTROL_SHARE = 0.2
MAX_RETENTION_LOSS = 0.1
MAX_CHANCE = 0.025
_ALLOWED = {
    "model-learning": "> 30% improve",
    "learning-signed": "> +30 points, 95% CI above 0, sign test p <= 0.025",
    "learning-control": "control <= 20%, tuned above it by > 30 points",
    "learning-retention": "at most 10 points lost",
}


def judge_learning(evidence: Evidence) -> list[Verdict]:
    """Verdicts on criterion 2; `not applicable` where there are no questions to ask."""
    learning = evidence.learning
    if learning is None:
        reason = evidence.why.get("learning", "no questions were asked")
        return [verdict(key, Outcome.NOT_APPLICABLE, NOT_MEASURED, _ALLOWED[key], reason) for key in _ALLOWED]
    return [
        _judge_improvement(learning),
        judge_signed(learning),
        _judge_shuffled_label_control(
            learning,
            evidence.why.get("control", "the shuffled-label control was not run"),
            able="control" not in evidence.unable,
        ),
        _judge_retention(learning, evidence.why.get("retention", "no retention questions were given")),
    ]


def _marks(scores: Scores) -> list[str]:
    return ["right" if answer.right else "wrong" for answer in scores.answers]


def _judge_improvement(learning: LearningEvidence) -> Verdict:
    truth = ["right"] * len(learning.base.answers)
    share = TrainingSuccessValidator.improved_share(_marks(learning.base), _marks(learning.tuned), truth)
    outcome = Outcome.of(share > MIN_IMPROVED_SHARE)
    reason = ""
    if outcome == Outcome.FAILED and learning.base.share >= 1 - MIN_IMPROVED_SHARE:
        outcome, reason = Outcome.INCONCLUSIVE, "the base answers so many already that too few could improve"
    measured = f"{share:.0%} improve ({learning.base.share:.0%} right before, {learning.tuned.share:.0%} after)"
    return verdict("model-learning", outcome, measured, _ALLOWED["model-learning"], reason, improved=share)


def judge_signed(learning: LearningEvidence) -> Verdict:
    """Whether many more answers got better than worse, each change with its sign, and not by chance."""
    count = len(learning.base.answers)
    pairs = list(zip(learning.base.answers, learning.tuned.answers, strict=True))
    better = sum(new.right and not old.right for old, new in pairs)
    worse = sum(old.right and not new.right for old, new in pairs)
    net = (better - worse) / count
    low, high = difference_interval((learning.tuned.right, count), (learning.base.right, count))
    chance = _chance_of(better, worse)
    sure = low > 0 and chance <= MAX_CHANCE
    outcome = (
        Outcome.PASSED
        if net > MIN_IMPROVED_SHARE and sure
        else Outcome.FAILED
        if high < MIN_IMPROVED_SHARE
        else Outcome.INCONCLUSIVE
    )
    if outcome == Outcome.INCONCLUSIVE and net <= 0:
        outcome = Outcome.FAILED
    measured = f"{better} better, {worse} worse of {count}: {100 * net:+.0f} points [{100 * low:.0f}, {100 * high:.0f}]"
    reason = f"not significant (sign test p = {chance:.2g})" if chance > MAX_CHANCE else ""
    return verdict(
        "learning-signed",
        outcome,
        measured,
        _ALLOWED["learning-signed"],
        reason,
        net=net,
        low=low,
        high=high,
        chance=chance,
    )


def _chance_of(better: int, worse: int) -> float:
    """How often coin flips make at least `better` of all changed answers right: the exact one-sided sign test.

    The two models answer the same questions, so that their shares are not independent as the interval takes them to
    be: answers that all flip at random would pass it three times as often as it promises.
    """
    changed = better + worse
    return float(sum(math.comb(changed, count) for count in range(better, changed + 1)) / 2**changed)


def _judge_shuffled_label_control(learning: LearningEvidence, why: str, *, able: bool) -> Verdict:
    if learning.control is None:
        outcome = Outcome.INCONCLUSIVE if able else Outcome.NOT_APPLICABLE
        return verdict("learning-control", outcome, NOT_MEASURED, _ALLOWED["learning-control"], why)
    control, short = learning.control.found, learning.control.tuned is not None
    # A shortened control has learned less than the final model whatever its rows: it is held against its equal.
    tuned = learning.control.tuned or learning.tuned
    low, high = difference_interval((tuned.right, len(tuned.answers)), (control.right, len(control.answers)))
    reason = ""
    if control.share > MAX_CONTROL_SHARE or (high < MIN_IMPROVED_SHARE and not short):
        outcome = Outcome.FAILED
    else:
        outcome = Outcome.PASSED if low > MIN_IMPROVED_SHARE else Outcome.INCONCLUSIVE
    if short:
        reason = f"both after {learning.control.steps} steps, as many of a control as judge.budget allows"
    measured = (
        f"control {control.share:.0%}, tuned {tuned.share:.0%}: difference [{100 * low:.0f}, {100 * high:.0f}] points"
    )
    return verdict(
        "learning-control",
        outcome,
        measured,
        _ALLOWED["learning-control"],
        reason,
        control=control.share,
        low=low,
        high=high,
    )


def could_pass(tuned: Scores) -> bool:
    """Whether a control that gets nothing right would show that this model learned the truth."""
    count = len(tuned.answers)
    return difference_interval((tuned.right, count), (0, count))[0] > MIN_IMPROVED_SHARE


def _judge_retention(learning: LearningEvidence, why: str) -> Verdict:
    base, tuned = learning.retention_base, learning.retention_tuned
    few = too_few_left(len(tuned.answers) if tuned else 0, learning.retention_trained, "retention rows")
    if base is None or tuned is None:
        outcome = Outcome.INCONCLUSIVE if few else Outcome.NOT_APPLICABLE
        return verdict("learning-retention", outcome, NOT_MEASURED, _ALLOWED["learning-retention"], few or why)
    lost = base.share - tuned.share
    low, high = wilson_interval(tuned.right, len(tuned.answers))
    surely_lost = difference_interval((base.right, len(base.answers)), (tuned.right, len(tuned.answers)))[0]
    outcome = Outcome.PASSED
    reason = ""
    if lost > MAX_RETENTION_LOSS:
        outcome = Outcome.FAILED if surely_lost > MAX_RETENTION_LOSS else Outcome.INCONCLUSIVE
        reason = f"{100 * lost:.0f} points are lost, {max(0.0, 100 * surely_lost):.0f} of them surely"
    if few and outcome == Outcome.PASSED:
        outcome, reason = Outcome.INCONCLUSIVE, few
    measured = (
        f"{base.share:.0%} before, {tuned.share:.0%} [{100 * low:.0f}, {100 * high:.0f}] after "
        f"on {len(tuned.answers)} questions"
    )
    if learning.retention_near:
        measured += f"; {counted(learning.retention_near, 'row')} nearly as in training"
    return verdict(
        "learning-retention", outcome, measured, _ALLOWED["learning-retention"], reason, lost=lost, low=low, high=high
    )
