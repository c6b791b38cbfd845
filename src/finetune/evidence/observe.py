"""Measures what the judges need: losses, answers, the shuffled-label control, memory, the saved adapter."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.criteria.evidence import (
    ArtifactEvidence,
    LearningEvidence,
    LossEvidence,
    MatchingEvidence,
    MemoryEvidence,
    OpenEvidence,
    Paired,
    ParameterEvidence,
)
from finetune.data.batches import fixed_batches
from finetune.errors import EvidenceError
from finetune.evidence.answers import ask
from finetune.evidence.memory import measure_memory
from finetune.evidence.open_answers import CHOICES, Matched, OpenLook, look, open_questions
from finetune.evidence.reload import check_reload
from finetune.ports import Session
from finetune.records import Batch, Question, Reload, Scores, TokenizedRow
from finetune.training.loop import mean_loss
from finetune.training.prepare import Prepared, held_out_batches, shuffled_rows

_FIXED_ROWS = 128
_FIXED_TOKENS = 4096
_FEWEST_FIXED = 8
"""The loss before and after is measured on up to so many rows, and fewer where rows are long."""
_RELOADED_PROMPTS = 8
_SMALL_MODEL = 50_000_000
"""Parameters up to which `auto` runs the shuffled-label control and the memory measurement: they take seconds."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One look at a session: what it answers, what it has kept, and its losses (nats per token, token count)."""

    learning: Scores | None
    retention: Scores | None
    fixed: tuple[float, int]
    held_out: tuple[float, int] | None
    open: OpenLook | None = None


def observe(session: Session, prepared: Prepared, base: Observation | None = None) -> Observation:
    """Look at the session as it is now; it is left as it was.

    Args:
        base: the look at the base, where this is the tuned model.
    """
    held_out = held_out_batches(prepared)
    openly = None
    if prepared.answers == "open":
        openly = look(session, prepared, open_questions(prepared), base.open if base else None)
    return Observation(
        open=openly,
        learning=score(session, prepared, prepared.questions),
        retention=score(session, prepared, prepared.retention),
        fixed=mean_loss(session, _spread(prepared)),
        held_out=mean_loss(session, held_out) if held_out else None,
    )


def score(session: Session, prepared: Prepared, questions: Sequence[Question]) -> Scores | None:
    """The session's answers to the questions; None when there are none to ask."""
    if not questions:
        return None
    encoder = prepared.encoder
    return ask(
        session,
        questions,
        encoder.tokenizer.decode,
        max_new_tokens=prepared.plan.config.evaluation.max_new_tokens,
        stop_ids=encoder.stop_ids,
    )


def _spread(prepared: Prepared) -> list[Batch]:
    """Fixed batches of training rows, evenly spread over the data when there are many."""
    rows: Sequence[TokenizedRow] = prepared.train.rows
    most = max(_FEWEST_FIXED, min(_FIXED_ROWS, _FIXED_TOKENS * len(rows) // prepared.train.counts.tokens))
    return fixed_batches(rows[:: max(1, len(rows) // most)][:most], prepared.plan.config.training.batch_size)


def loss_evidence(
    prepared: Prepared, per_step: Sequence[float], before: Observation, after: Observation
) -> LossEvidence:
    """The losses for the judge."""
    return LossEvidence(
        per_step=tuple(per_step),
        fixed_before=before.fixed[0],
        fixed_after=after.fixed[0],
        vocab_size=prepared.shape.vocab_size,
        held_out_before=before.held_out[0] if before.held_out else None,
        held_out_after=after.held_out[0] if after.held_out else None,
    )


def open_evidence(prepared: Prepared, before: Observation, after: Observation) -> OpenEvidence | None:
    """Both looks at open answers, for the judge; None where answers are exact."""
    base, tuned = before.open, after.open
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
    prepared: Prepared,
    before: Observation,
    after: Observation,
    train_shuffled: Callable[[tuple[TokenizedRow, ...]], Session] | None,
    why: dict[str, str],
) -> LearningEvidence | None:
    """Scores before and after, and of a model trained in the same way on shuffled answers."""
    if before.learning is None or after.learning is None:
        texts = not prepared.conversations
        limit = prepared.plan.config.evaluation.max_new_tokens
        why["learning"] = (
            "text rows ask no question: there is no answer to compare"
            if texts
            else "no questions were asked (evaluation.questions is 0)"
            if prepared.plan.config.evaluation.questions == 0
            else f"no answer is shorter than {limit} tokens, so none can be compared word for word"
        )
        return None
    control = None
    rows = shuffled_label_rows(prepared, why) if train_shuffled else None
    if train_shuffled and rows:
        control = score(train_shuffled(rows), prepared, prepared.questions)
    elif "control" not in why:
        why["control"] = "one answer fills half of the rows, so answers cannot be shuffled"
    return LearningEvidence(before.learning, after.learning, control, before.retention, after.retention)


def shuffled_label_rows(prepared: Prepared, why: dict[str, str]) -> tuple[TokenizedRow, ...] | None:
    """The rows that the shuffled-label control is trained on; None where there is to be none."""
    return shuffled_rows(prepared) if prepared.questions and makes_extra_run(prepared, "control", why) else None


def memory_evidence(prepared: Prepared, why: dict[str, str]) -> MemoryEvidence | None:
    """LoRA and full fine-tuning, each measured in a fresh process at the same sizes; None where that failed."""
    config = prepared.plan.config
    assert prepared.target is not None
    sizes = {
        "batch_size": config.judge.memory_batch_size,
        "length": config.judge.memory_length,
        "dtype": config.model.dtype,
        "vocab_size": prepared.shape.vocab_size,
    }
    try:
        lora = measure_memory(config.backend, prepared.location, prepared.target, method="lora", sizes=sizes)
        full = measure_memory(config.backend, prepared.location, prepared.target, method="full", sizes=sizes)
    except EvidenceError as error:
        why["memory"] = f"the measurement failed: {error.message}"
        return None
    return MemoryEvidence(lora, full)


def artifact_evidence(
    prepared: Prepared, session: Session, saved: Path, files: Sequence[Mapping[str, Any]], why: dict[str, str]
) -> ArtifactEvidence:
    """Sizes of what was written, and what a fresh process makes of the saved adapter or model."""
    found: Reload | None = None
    rows = prepared.train.rows[:_RELOADED_PROMPTS]
    config = prepared.plan.config
    try:
        found = check_reload(
            config.backend,
            session,
            prepared.location,
            saved,
            prompts=[row.ids for row in rows],
            dtype=config.model.dtype,
            quantize=config.quantization,
        )
    except EvidenceError as error:
        why["reload"] = error.message
    sizes = {str(file["path"]): int(file["bytes"]) for file in files}
    stray = tuple(path for path in sizes if path.endswith(".part") or "/." in f"/{path}")
    return ArtifactEvidence(sizes, found, stray)


def parameter_evidence(
    prepared: Prepared, session: Session, before: Mapping[str, str], first_gradients: Mapping[str, float], steps: int
) -> ParameterEvidence:
    """Fingerprints before and after, for the judge."""
    kind = prepared.plan.config.adapter.kind
    declared = tuple(session.trainable_names())
    return ParameterEvidence(before, session.fingerprints(), declared, first_gradients, steps, kind)


def makes_extra_run(prepared: Prepared, name: str, why: dict[str, str], unable: frozenset[str] = frozenset()) -> bool:
    """Whether the extra runs of `judge.control` or `judge.memory` are to be made; where not, `why` says why."""
    if name == "memory" and prepared.target is None:
        why[name] = "the whole model is trained (adapter.kind is full): there is no adapter to compare with that"
        return False
    if name == "memory" and prepared.shape.quantized:
        why[name] = "the base is quantised: it cannot be fully fine-tuned, so there is nothing to compare with"
        return False
    choice = getattr(prepared.plan.config.judge, name)
    if name in unable:
        why[name] = f"the {prepared.plan.config.backend} backend has no means to measure it"
        return False
    if choice == "auto" and prepared.shape.parameters > _SMALL_MODEL:
        why[name] = (
            f"not run by itself above {_SMALL_MODEL / 1e6:.0f} M parameters: ask for it with judge.{name}=always"
        )
        return False
    if choice == "never":
        why[name] = f"switched off (judge.{name}=never)"
        return False
    return True
