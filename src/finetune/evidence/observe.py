"""Measures what the judges need: losses, answers, what became of the weights, the saved adapter."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.criteria.evidence import (
    FEWEST_PAIRS,
    ArtifactEvidence,
    ControlEvidence,
    LearningEvidence,
    LossEvidence,
    MatchingEvidence,
    OpenEvidence,
    Paired,
    ParameterEvidence,
    PreferenceEvidence,
)
from finetune.errors import EvidenceError
from finetune.evidence.answers import ask
from finetune.evidence.asked import Asked, reloaded, what_to_ask
from finetune.evidence.open_answers import CHOICES, Matched, OpenLook, look
from finetune.evidence.reload import check_reload
from finetune.objectives.cross_entropy import CROSS_ENTROPY
from finetune.objectives.preference import Preference
from finetune.objectives.row_sums import row_sums
from finetune.ports import Objective, Session
from finetune.records import Question, Reload, Scores, TokenizedRow
from finetune.training.loop import mean_loss
from finetune.training.prepare import Prepared
from finetune.training.start import Beginning


@dataclass(frozen=True, slots=True)
class Observation:
    """One look at a session: what it answers, what it has kept, and its losses (nats per token, token count).

    `held_out` is that of all held-out rows, `unseen` that of those whose words training does not repeat.
    """

    asked: Asked
    learning: Scores | None
    retention: Scores | None
    fixed: tuple[float, int]
    held_out: tuple[float, int] | None
    unseen: tuple[float, int] | None
    open: OpenLook | None = None


def observe(
    session: Session, prepared: Prepared, base: Observation | None = None, objective: Objective = CROSS_ENTROPY
) -> Observation:
    """Look at the session as it is now; it is left as it was.

    Args:
        base: the look at the base, where this is the tuned model.
        objective: what losses are measured in.
    """
    asked = base.asked if base else what_to_ask(prepared)
    openly = None
    if asked.open:
        openly = look(session, prepared, asked.open, base.open if base else None)
    return Observation(
        asked=asked,
        open=openly,
        learning=score(session, prepared, asked.learning),
        retention=score(session, prepared, asked.retention),
        **_losses(session, asked, objective),
    )


def _losses(session: Session, asked: Asked, objective: Objective) -> dict[str, Any]:
    parts = (asked.held_out, asked.alike)
    unseen, alike = (mean_loss(session, rows, objective) if rows else None for rows in parts)
    held_out = _of_both(unseen, alike) if unseen and alike else unseen or alike
    return {"fixed": mean_loss(session, asked.fixed, objective), "held_out": held_out, "unseen": unseen}


def losses_at_start(session: Session, base: Observation, objective: Objective) -> Observation:
    """The look at the base, with its losses in this objective; preferences are measured from the session as it is."""
    return replace(base, **_losses(session, base.asked, objective)) if isinstance(objective, Preference) else base


def pair_gains(session: Session, asked: Asked, objective: Preference) -> tuple[float, ...]:
    """By how many nats chosen gained on rejected, in the pairs that a control is compared on."""
    rows = compared_pairs(asked)
    return _gained(objective, rows, row_sums(session, rows))


def compared_pairs(asked: Asked) -> list[TokenizedRow]:
    """The sides of the unseen pairs, or of trained ones where those are few."""
    unseen = [row for batch in asked.held_out for row in batch.rows]
    return unseen if len(unseen) >= 2 * FEWEST_PAIRS else [row for batch in asked.fixed for row in batch.rows]


def _gained(objective: Preference, sides: Sequence[TokenizedRow], now: NDArray[np.float64]) -> tuple[float, ...]:
    moved = np.array([objective.reference[row] for row in sides]) - now
    return tuple((moved[::2] - moved[1::2]).tolist())


def preference_evidence(session: Session, asked: Asked, objective: Objective) -> PreferenceEvidence | None:
    """What the tuned model makes of training pairs and of unseen ones; None where rows are no pairs."""
    if not isinstance(objective, Preference):
        return None
    fixed, unseen = ([row for batch in part for row in batch.rows] for part in (asked.fixed, asked.held_out))
    rows = [*fixed, *unseen]
    before = np.array([objective.reference[row] for row in rows])
    now = row_sums(session, rows)
    gained = _gained(objective, rows, now)
    lengths = np.array([row.target_count for row in rows[::2]])
    split = len(fixed) // 2
    return PreferenceEvidence(
        beta=objective.beta,
        rows=gained[:split],
        unseen=gained[split:],
        liked=tuple(tuple((each[::2] < each[1::2])[split:].tolist()) for each in (before, now)),
        chosen=Paired(*(tuple((each[::2] / lengths).tolist()) for each in (before, now))),
    )


def _of_both(one: tuple[float, int], other: tuple[float, int]) -> tuple[float, int]:
    count = one[1] + other[1]
    return (one[0] * one[1] + other[0] * other[1]) / count, count


def begin_at(session: Session, base: Observation) -> Beginning:
    """The losses of the adapter that training goes on from, on what the base was looked at with."""
    asked = base.asked
    held_out = (*asked.held_out, *asked.alike)
    return Beginning(mean_loss(session, asked.fixed), mean_loss(session, held_out) if held_out else None)


def score(session: Session, prepared: Prepared, questions: Sequence[Question]) -> Scores | None:
    """The session's answers to the questions; None when there are none to ask."""
    if not questions:
        return None
    encoder = prepared.encoder
    return ask(
        session,
        questions,
        encoder.said,
        max_new_tokens=prepared.plan.config.evaluation.max_new_tokens,
        stop_ids=encoder.stop_ids,
    )


def what_is_compared(
    session: Session, prepared: Prepared, asked: Asked, objective: Objective
) -> Scores | tuple[float, ...] | None:
    """What of this session is held against that of another: its answers, or the gains of its pairs."""
    if isinstance(objective, Preference):
        return pair_gains(session, asked, objective)
    return score(session, prepared, asked.learning)


def loss_evidence(
    prepared: Prepared, per_step: Sequence[float], before: Observation, after: Observation
) -> LossEvidence:
    """The losses for the judge."""
    return LossEvidence(
        per_step=tuple(per_step),
        fixed_before=before.fixed[0],
        fixed_after=after.fixed[0],
        vocab_size=prepared.shape.vocab_size,
        held_out_before=before.unseen[0] if before.unseen else None,
        held_out_after=after.unseen[0] if after.unseen else None,
        held_out_rows=sum(len(batch.sequences) for batch in before.asked.held_out),
        held_out_trained=len(prepared.overlaps["valid"].repeated),
        held_out_near=len(prepared.overlaps["valid"].twins) - len(prepared.overlaps["valid"].repeated),
    )


def open_evidence(prepared: Prepared, base: OpenLook | None, tuned: OpenLook | None) -> OpenEvidence | None:
    """Both looks at open answers, for the judge; None where answers are exact."""
    if base is None or tuned is None:
        return None

    def matching(old: Matched | None, new: Matched | None) -> MatchingEvidence | None:
        if old is None or new is None:
            return None
        return MatchingEvidence(old.first, new.first, CHOICES)

    return OpenEvidence(
        goal=prepared.goal,
        rows=matching(base.rows, tuned.rows),
        losses=Paired(base.losses, tuned.losses),
        unseen=Paired(base.unseen, tuned.unseen),
        association=matching(base.association, tuned.association),
        text=Paired(base.text, tuned.text),
        own_answers=Paired(base.own_answers, tuned.own_answers),
        right=(base.right, tuned.right),
        ended=tuned.ended,
        copied=tuned.copied,
        longest=tuned.longest,
        uniform=math.log(prepared.shape.vocab_size),
    )


def learning_evidence(
    before: Observation,
    after: Observation,
    control: ControlEvidence[Scores] | None,
    prepared: Prepared,
    why: dict[str, str],
) -> LearningEvidence | None:
    """Scores before and after, and of a model trained in the same way on shuffled answers."""
    if before.learning is None or after.learning is None:
        evaluation = prepared.plan.config.evaluation
        why["learning"] = (
            "text rows ask no question: there is no answer to compare"
            if not prepared.conversations
            else "rows are pairs (training.objective is dpo): no answer is the one right wording"
            if prepared.pairs
            else "no questions were asked (evaluation.questions is 0)"
            if evaluation.questions == 0
            else f"no answer is shorter than {evaluation.max_new_tokens} tokens, so none can be compared word for word"
        )
        return None
    overlap = prepared.overlaps["retention"]
    return LearningEvidence(
        before.learning,
        after.learning,
        control,
        before.retention,
        after.retention,
        retention_trained=len(overlap.repeated),
        retention_near=len(overlap.twins) - len(overlap.repeated),
    )


def artifact_evidence(
    prepared: Prepared, session: Session, saved: Path, sizes: Mapping[str, int], why: dict[str, str]
) -> ArtifactEvidence:
    """Sizes of what was written, and what a fresh process makes of the saved adapter or model."""
    found: Reload | None = None
    config = prepared.plan.config
    try:
        found = check_reload(
            config.backend,
            session,
            prepared.location,
            saved,
            prompts=reloaded(prepared),
            dtype=config.model.dtype,
            quantize=config.quantization,
        )
    except EvidenceError as error:
        why["reload"] = error.message
    stray = tuple(path for path in sizes if path.endswith(".part") or "/." in f"/{path}")
    return ArtifactEvidence(sizes, found, stray)


def parameter_evidence(
    prepared: Prepared, session: Session, before: Mapping[str, str], first_gradients: Mapping[str, float], steps: int
) -> ParameterEvidence:
    """Fingerprints before and after, for the judge."""
    kind = prepared.plan.config.adapter.kind
    declared = tuple(session.trainable_names())
    return ParameterEvidence(before, session.fingerprints(), declared, first_gradients, steps, kind)
