"""Judges open answers: separate claims of learning and of harm, each with an exact test and an effect floor.

A row counts for a claim only when it moved by more than the floor, so that a shift too small to matter is no evidence,
however many rows share it. The test is the sign test over rows, as the tokens of a row depend on each other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from finetune.criteria.evidence import MatchingEvidence, OpenEvidence, Paired
from finetune.criteria.verdicts import NOT_MEASURED, verdict
from finetune.errors import EvidenceError
from finetune.intervals import chance_of_at_least
from finetune.records import Outcome, Verdict

LEVEL = 0.01
"""How often a claim may come out by chance alone; claims of harm share it."""
EFFECT_FLOOR = 0.02
"""The share of the base's loss by which a row must move to count."""
GAIN_FLOOR = 0.1
"""The share of the rows by which those whose own answer is the likeliest must grow."""
HARM_MARGIN = 0.05
"""The share of the base's loss by which neutral text may get less likely."""
OWN_MARGIN = 0.5
"""By how many nats per token the base's own answers may get less likely. Any new style costs them something.

On SmolLM2-135M 100 true question and answer rows cost 0.27 on average, the same rows with shuffled answers 0.92.
"""
KEPT_SHARE = 0.75
"""Of the neutral questions that the base answers, the tuned model must still answer so many."""
_FEWEST_QUESTIONS = 8
_FEWEST_MISSED = 7
"""From so many rows on, all of them gained or none can be told from chance."""
_MOST_COPIED = 0.5
_BLIND = 0.9
"""From this share of a uniform guess's loss on, a base knows too little of a text to lose any of it."""
GOALS = {
    "rows": ("claim-rows",),
    "style": ("claim-rows", "claim-unseen", "claim-recites"),
    "generalise": ("claim-rows", "claim-unseen", "claim-recites", "claim-association"),
}
"""Which claims a goal needs, beside those that every goal needs: nothing is forgotten, and answers end."""
_ALWAYS = ("claim-retention", "claim-ends")


@dataclass(frozen=True, slots=True)
class Moves:
    """How many of `count` rows fell and rose by more than a floor, and by how much they moved on the average."""

    fell: int
    rose: int
    count: int
    mean: float
    floor: float

    @classmethod
    def of(cls, losses: Paired, floor: float) -> "Moves":
        """From the losses of the same rows before and after."""
        moves = [after - before for before, after in zip(losses.base, losses.tuned, strict=True)]
        return cls(
            sum(move < -floor for move in moves), sum(move > floor for move in moves), len(moves), fmean(moves), floor
        )

    @property
    def outcome(self) -> Outcome:
        """PASSED: more than half of all rows fell, not by chance. FAILED: that can be excluded, by chance alike."""
        if chance_of_at_least(self.fell, self.count) <= LEVEL:
            return Outcome.PASSED
        not_fallen = self.count - self.fell
        return Outcome.FAILED if chance_of_at_least(not_fallen, self.count) <= LEVEL else Outcome.INCONCLUSIVE


def judge_claims(evidence: OpenEvidence) -> list[Verdict]:
    """A verdict on each claim; those that the goal does not need are shown and do not count.

    Raises:
        EvidenceError: a loss is not a finite number.
    """
    for name in ("losses", "unseen", "text", "own_answers"):
        pair: Paired = getattr(evidence, name)
        if not all(map(math.isfinite, (*pair.base, *pair.tuned))):
            raise EvidenceError(
                f"a loss of {name.replace('_', ' ')} is not a finite number: nothing can be judged by it"
            )
    needed = (*GOALS[evidence.goal], *_ALWAYS)
    found = [
        _judge_rows(evidence),
        _judge_unseen(evidence),
        _judge_association(evidence),
        _judge_retention(evidence),
        _judge_ends(evidence),
        _judge_recites(evidence),
    ]
    return [replace(each, counts=each.id in needed) for each in found]


def rows_needed(moves: Moves) -> int | None:
    """How many rows would decide, were the share that fell to stay; None where it stands at a half."""
    share = moves.fell / moves.count if moves.count else 0.5
    distance = abs(share - 0.5)
    # The normal approximation of a sign test of this level, met with a power of 80%.
    return math.ceil(((2.33 + 0.84) * 0.5 / distance) ** 2) if distance > 0.02 else None


def _judged(key: str, moves: Moves, measured: str, **numbers: float) -> Verdict:
    reason = ""
    if moves.outcome == Outcome.INCONCLUSIVE:
        enough = rows_needed(moves)
        reason = f"{moves.count} rows are too few to tell" + (f"; about {enough} would do" if enough else "")
    found = f"{moves.fell} of {moves.count} rows by more than {moves.floor:.2g} nats ({moves.mean:+.3g} on average)"
    numbers |= {"fell": moves.fell, "rose": moves.rose, "count": moves.count, "mean": moves.mean, "floor": moves.floor}
    return replace(verdict(key, moves.outcome, f"{measured}: {found}", _MORE_THAN_HALF, reason), numbers=numbers)


_MORE_THAN_HALF = f"more than half of the rows, by chance at most {LEVEL:.0%}"


def _judge_rows(evidence: OpenEvidence) -> Verdict:
    rows = evidence.rows
    if rows and len(rows.base) - sum(rows.base) >= _FEWEST_MISSED:
        return judge_matching("claim-rows", rows)
    if not evidence.losses.base:
        reason = "no row has an answer that others could be told from"
        return verdict("claim-rows", Outcome.INCONCLUSIVE, NOT_MEASURED, _MORE_THAN_HALF, reason)
    found = _judged("claim-rows", Moves.of(evidence.losses, EFFECT_FLOOR * fmean(evidence.losses.base)), "likelier")
    return _still_matched(found, rows) if rows else found


def _still_matched(found: Verdict, rows: MatchingEvidence) -> Verdict:
    """Where the base tells nearly all own answers already, none can be gained: they get likelier, and it still does.

    Rows with others' answers get likelier, too, but a model that was trained on them tells fewer own ones.
    """
    count, base, still = len(rows.base), sum(rows.base), sum(rows.tuned)
    measured = f"{found.measured}; own answer the likeliest of {rows.choices} in {base}, then {still} of {count}"
    allowed = f"{found.allowed}; more than {KEPT_SHARE:.0%} still told, by chance at most {LEVEL:.0%}"
    outcome, reason = found.outcome, found.reason
    if chance_of_at_least(count - still, count, 1 - KEPT_SHARE) <= LEVEL:
        outcome, reason = Outcome.FAILED, f"own answers are told from others' in {still} of {count} rows only"
    elif outcome == Outcome.PASSED and chance_of_at_least(still, count, KEPT_SHARE) > LEVEL:
        outcome, reason = Outcome.INCONCLUSIVE, f"{count} rows are too few to tell that own answers are still told"
    numbers = {**found.numbers, "base": base, "tuned": still}
    return replace(found, outcome=outcome, measured=measured, allowed=allowed, reason=reason, numbers=numbers)


def judge_matching(key: str, found: MatchingEvidence) -> Verdict:
    """Whether own answers became the likeliest of several: the loss alone falls for rows with others' answers, too."""
    pairs = list(zip(found.base, found.tuned, strict=True))
    count, base, tuned = len(pairs), sum(found.base), sum(found.tuned)
    better, worse = (sum(pair == want for pair in pairs) for want in ((False, True), (True, False)))
    chance = chance_of_at_least(better, better + worse)
    missed = count - base
    if chance <= LEVEL and better - worse >= GAIN_FLOOR * count:
        outcome, reason = Outcome.PASSED, ""
    elif chance_of_at_least(missed - better, missed) <= LEVEL:
        outcome, reason = Outcome.FAILED, f"of {missed} that the base missed, {better} were gained"
    elif missed < _FEWEST_MISSED:
        told = f"the base tells all but {missed} already" if missed else "the base tells all of them already"
        outcome, reason = Outcome.INCONCLUSIVE, f"{told}: too few could be gained"
    else:
        outcome, reason = Outcome.INCONCLUSIVE, f"{count} rows are too few to tell"
    first = f"own answer the likeliest of {found.choices} in {base}, then {tuned} of {count}"
    measured = f"{first} ({better} better, {worse} worse)"
    allowed = f"at least {GAIN_FLOOR:.0%} more, by chance at most {LEVEL:.0%}"
    numbers = {"base": base, "tuned": tuned, "count": count, "better": better, "worse": worse, "chance": chance}
    return replace(verdict(key, outcome, measured, allowed, reason), numbers=numbers)


def _judge_unseen(evidence: OpenEvidence) -> Verdict:
    if not evidence.unseen.base:
        reason = "no row was held out that differs enough from all training rows"
        return verdict("claim-unseen", Outcome.INCONCLUSIVE, NOT_MEASURED, _MORE_THAN_HALF, reason)
    moves = Moves.of(evidence.unseen, EFFECT_FLOOR * fmean(evidence.unseen.base))
    told = f"loss {fmean(evidence.unseen.base):.3g} to {fmean(evidence.unseen.tuned):.3g}; likelier"
    return _judged("claim-unseen", moves, told)


def _judge_association(evidence: OpenEvidence) -> Verdict:
    if evidence.association is None:
        asked = evidence.goal == "generalise"
        reason = "there are too few unseen rows" if asked else "not asked for: judge.goal=generalise does"
        outcome = Outcome.INCONCLUSIVE if asked else Outcome.NOT_APPLICABLE
        return verdict("claim-association", outcome, NOT_MEASURED, _MORE_THAN_HALF, reason)
    return judge_matching("claim-association", evidence.association)


def _judge_retention(evidence: OpenEvidence) -> Verdict:
    """Harm is its own question: three exact tests that share one level (Holm), and non-inferiority to pass."""
    allowed = (
        f"most neutral text at most {HARM_MARGIN:.0%}, most own answers at most {OWN_MARGIN:g} nats less likely; "
        f"{KEPT_SHARE:.0%} of the base's right answers kept"
    )
    harms: list[tuple[float, str]] = []
    kept: list[bool] = []
    told: list[str] = []
    numbers: dict[str, float] = {}
    # A base that cannot read neutral text answers neutral prompts with noise, however sure it is of it.
    blind = bool(evidence.text.base) and fmean(evidence.text.base) > _BLIND * evidence.uniform
    for name, losses, margin in (
        ("text", evidence.text, HARM_MARGIN * fmean(evidence.text.base or [0])),
        ("own answers", evidence.own_answers, OWN_MARGIN),
    ):
        if not losses.base or blind:
            continue
        moves = Moves.of(losses, margin)
        harms.append((chance_of_at_least(moves.rose, moves.count), name))
        kept.append(chance_of_at_least(moves.count - moves.rose, moves.count) <= LEVEL)
        told.append(f"{name} {moves.mean:+.3g} nats, {moves.rose} of {moves.count} beyond {moves.floor:.2g}")
        numbers |= {
            f"{name} {key}": value
            for key, value in (("mean", moves.mean), ("harmed", moves.rose), ("count", moves.count))
        }
    base, tuned = evidence.right
    known = sum(base)
    still = sum(old and new for old, new in zip(base, tuned, strict=True))
    if known >= _FEWEST_QUESTIONS:
        harms.append((chance_of_at_least(known - still, known, 1 - KEPT_SHARE), "questions"))
        told.append(f"{still} of {known} known questions still answered")
        if not kept:
            kept.append(chance_of_at_least(still, known, KEPT_SHARE) <= LEVEL)
        numbers |= {"questions known": known, "questions kept": still}
    if not harms:
        reason = "the base knows too little of neutral text to lose any: name what it must keep with data.retention"
        return verdict("claim-retention", Outcome.INCONCLUSIVE, NOT_MEASURED, allowed, reason)
    harmed = _holm(harms)
    outcome = Outcome.FAILED if harmed else Outcome.PASSED if all(kept) else Outcome.INCONCLUSIVE
    reason = f"harmed: {', '.join(harmed)}" if harmed else "" if all(kept) else "harm is neither shown nor excluded"
    return replace(verdict("claim-retention", outcome, "; ".join(told), allowed, reason), numbers=numbers)


def _holm(tests: Sequence[tuple[float, str]]) -> list[str]:
    """The names of the tests that stay significant when all of them share one level.

    Source: S. Holm, 1979, "A simple sequentially rejective multiple test procedure".
    """
    found = []
    for place, (chance, name) in enumerate(sorted(tests)):
        if chance > LEVEL / (len(tests) - place):
            break
        found.append(name)
    return found


def _judge_ends(evidence: OpenEvidence) -> Verdict:
    allowed = f"most end within {evidence.longest} tokens, by chance at most {LEVEL:.0%}"
    if not evidence.ended:
        reason = "text rows ask nothing"
        return verdict("claim-ends", Outcome.NOT_APPLICABLE, NOT_MEASURED, allowed, reason)
    return _most("claim-ends", sum(evidence.ended), len(evidence.ended), "answers end", allowed)


def _judge_recites(evidence: OpenEvidence) -> Verdict:
    allowed = f"most copy less than {_MOST_COPIED:.0%} of themselves from one training row in one piece"
    if not evidence.copied:
        reason = "no trained answer is long enough to be recited, or none is asked for"
        return verdict("claim-recites", Outcome.NOT_APPLICABLE, NOT_MEASURED, allowed, reason)
    own = sum(share < _MOST_COPIED for share in evidence.copied)
    return _most("claim-recites", own, len(evidence.copied), "answers are no copies", allowed)


def _most(key: str, good: int, count: int, told: str, allowed: str) -> Verdict:
    outcome, reason = Outcome.INCONCLUSIVE, f"{count} answers are too few to tell"
    if chance_of_at_least(good, count) <= LEVEL:
        outcome, reason = Outcome.PASSED, ""
    elif chance_of_at_least(count - good, count) <= LEVEL:
        outcome, reason = Outcome.FAILED, ""
    return verdict(key, outcome, f"{good} of {count} {told}", allowed, reason, good=good, count=count)
