"""What to try after a verdict: each piece of advice follows from something that was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.chat.fit import DataCounts
from finetune.config.derive import FEWEST_STEPS
from finetune.criteria.evidence import Evidence
from finetune.criteria.validator import MIN_IMPROVED_SHARE, TrainingSuccessValidator
from finetune.records import Outcome, Verdict

_KNOWN = 0.9
_LITTLE = 0.2
"""A loss that fell by less than this share has not begun to be learned."""
_FAR = 2.0
"""A learning rate this many times above or below the usual one is named as the likely cause."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What advice needs beside the evidence: what became of the rows, and how they were trained on.

    `usual_rate` is the learning rate that a model of this size gets where none is set.
    """

    counts: DataCounts
    learning_rate: float
    usual_rate: float
    unseen: int
    fewest_unseen: int


def advise(evidence: Evidence, verdicts: Sequence[Verdict], facts: RunFacts) -> tuple[str, ...]:
    """Sentences that say what was seen and which setting to change; none after a run without a fault."""
    outcomes = {each.id: each.outcome for each in verdicts if each.counts}
    found = [_dropped(facts.counts), _unseen(evidence, facts), _not_learned(evidence, outcomes, facts)]
    if _failed(outcomes, "claim-retention", "learning-retention"):
        slower = f"training.learning_rate (it is {facts.learning_rate:g}"
        slower += f"; {facts.usual_rate:g} is usual for this size)" if _too_fast(facts) else ")"
        found.append(
            f"the model forgot what its base knew: lower {slower} or training.epochs, or "
            + (
                "raise training.dpo_beta"
                if evidence.preference
                else "mix in rows of what it must keep (data.rehearsal)"
            )
        )
    if _failed(outcomes, "preference-chosen"):
        found.append(
            "chosen answers collapse: lower training.learning_rate or training.epochs, or raise training.dpo_beta"
        )
    if _failed(outcomes, "claim-recites"):
        found.append("the model recites its rows: train for fewer training.epochs, or on more rows")
    if _failed(outcomes, "claim-ends"):
        found.append(
            "answers do not end: the end of an answer must be trained, and the model must stop there; look at what "
            "`ft check` shows of a row, and at template.name"
        )
    if _failed(outcomes, "loss-start"):
        found.append("the base is worse than a guess on these rows: check model.path and its tokenizer")
    return tuple(each for each in found if each)


def _too_fast(facts: RunFacts) -> bool:
    return facts.learning_rate >= _FAR * facts.usual_rate


def _failed(outcomes: Mapping[str, Outcome], *keys: str) -> bool:
    return any(outcomes.get(key) == Outcome.FAILED for key in keys)


def _dropped(counts: DataCounts) -> str:
    return f"{counts.many_dropped}; mend them, or raise tokens.max_length" if counts.many_dropped else ""


def _unseen(evidence: Evidence, facts: RunFacts) -> str:
    if evidence.open is None or facts.unseen >= facts.fewest_unseen:
        return ""
    return (
        f"{facts.unseen} unseen rows were held out: with {facts.fewest_unseen} or more, the verdict also says whether "
        "anything carries over (data.valid, or data.valid_fraction)"
    )


def _not_learned(evidence: Evidence, outcomes: Mapping[str, Outcome], facts: RunFacts) -> str:
    """Why rows were not learned: they were known before, or training was too short or too slow."""
    if not any(
        outcomes.get(key, Outcome.PASSED) != Outcome.PASSED
        for key in ("claim-rows", "learning-signed", "preference-rows")
    ):
        return ""
    rows, learning = (evidence.open.rows if evidence.open else None), evidence.learning
    known = sum(rows.base) / len(rows.base) if rows else learning.base.share if learning else 0.0
    fell = TrainingSuccessValidator.loss_reduction((evidence.loss.fixed_before, evidence.loss.fixed_after))
    # To tell open answers apart is not to know them: where their loss fell much, there was something to learn.
    if known >= (_KNOWN if rows else 1 - MIN_IMPROVED_SHARE) and not (rows and fell >= _LITTLE):
        return f"the base gets {known:.0%} of these rows right already: there is little to learn from them"
    steps, lost = len(evidence.loss.per_step), f"the loss on fixed batches fell by {fell:.0%}"
    if fell >= _LITTLE:
        right = learning.tuned.share if learning and not rows else 1.0
        told = f"{lost} in {steps} steps, and {right:.0%} of the answers are right: train longer"
        return f"{told} (training.epochs)" if right < _KNOWN else ""
    if facts.usual_rate >= _FAR * facts.learning_rate:
        return (
            f"{lost} only: raise training.learning_rate (it is {facts.learning_rate:g}; "
            f"{facts.usual_rate:g} is usual for this size)"
        )
    if 0 < steps < FEWEST_STEPS:
        return f"{lost} in {steps} steps: train longer (training.epochs, or a smaller batch_size)"
    return (
        f"{lost} only, at a usual learning rate in {steps} steps: train longer (training.epochs), "
        "with a higher adapter.rank, or look at the rows"
    )
