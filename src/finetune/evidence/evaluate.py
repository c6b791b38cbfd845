"""Measures a finished run on a file of the user's rows: base and tuned model, each measure with its interval."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from operator import mul
from pathlib import Path
from statistics import fmean
from typing import Any

from finetune.config import load_plan
from finetune.criteria.claims import EFFECT_FLOOR, Moves, judge_matching
from finetune.criteria.evidence import LearningEvidence, MatchingEvidence, Paired
from finetune.criteria.judge_learning import judge_signed
from finetune.criteria.judge_preference import gains_of
from finetune.data.overlap import COMPARED, Overlap, find_overlap
from finetune.data.shape import Example, ShapedRows
from finetune.data.split import content_key, hold_out
from finetune.data.stored import join
from finetune.data.survey import AnswerKind, answer_kind, survey_repeats
from finetune.errors import DataError, UsageError
from finetune.evidence.observe import score
from finetune.evidence.open_answers import CHOICES, Matched, Matching, match_rows, row_losses
from finetune.evidence.reopen import base_of_run, reopen
from finetune.files import make_folder, write_json
from finetune.intervals import difference_interval, mean_interval, wilson_interval
from finetune.objectives.row_sums import row_sums
from finetune.ports import Session
from finetune.records import Question, Scores, TokenizedRow
from finetune.run.folder import RunFolder
from finetune.training.prepare import Prepared
from finetune.training.questions import trained_questions
from finetune.training.rows import read_shaped

MOST_ROWS = 512
"""So many rows are asked where nothing else is said."""
_MATCHED = 128


@dataclass(frozen=True, slots=True)
class _OnFile:
    """What one look asks: the rows themselves, questions to compare word for word, answers to tell apart."""

    rows: Sequence[TokenizedRow]
    questions: tuple[Question, ...]
    matching: Matching | None


@dataclass(frozen=True, slots=True)
class _Look:
    """What one model made of it."""

    losses: tuple[float, ...]
    scores: Scores | None
    matched: Matched | None
    leads: tuple[float, ...] = ()
    """Of pairs: by how many nats log p of the chosen answer is above that of the rejected one."""


def evaluate(
    run: str | Path, data: str | Path, *, limit: int = MOST_ROWS, tell: Callable[[str], None] = lambda words: None
) -> dict[str, Any]:
    """Measure base and tuned model of a finished run on rows that it was not trained on.

    Rows that stand in its training rows, word for word or nearly, are left out, and told.

    Args:
        data: a file in any shape that can be trained on.
        limit: so many rows are asked at most, spread evenly over the file.
        tell: receives a sentence for each thing that takes time.

    Returns:
        run, data, answers, measures (each with base, tuned and an interval) and notes, as JSON values; `written` is the
        file below the run's `evaluations/` that holds them.

    Raises:
        FineTuneError: the run or the rows cannot be used, or no row is left to measure on.
    """
    folder = RunFolder.finished(Path(run))
    if limit < 1:
        raise UsageError(f"limit is {limit}: no row would be asked", hint="name how many rows are to be asked")
    data = str(data)
    settings = load_plan(folder.plan).config
    shaped = read_shaped(settings, "valid", (data,))
    prepared, session = reopen(Path(run))
    rows, overlap = _unseen(prepared, shaped.examples, limit)
    notes = [*(f"{data}: {note}" for note in shaped.notes), *overlap.sentences(data), *_unread(shaped, data)]
    asked, kind, counts = _ask(prepared, replace(shaped, examples=rows), data)
    tell(f"asking the base and the tuned model {len(asked.rows)} rows each")
    with base_of_run(prepared, session) as model:
        base = _look(model, prepared, asked)
    measures = _measures(prepared, asked, base, _look(session, prepared, asked))
    if prepared.plan.config.model.adapter:
        notes.append(
            "the run went on from an adapter: the rows that this had been trained on before are not known here"
        )
    digest = sha256("".join(map(content_key, shaped.examples)).encode()).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", Path(data).stem)[:60]
    written = folder.evaluations / f"{name}-{digest[:8]}-{limit}.json"
    found = {
        "run": folder.path.resolve().name,
        "model": [each for each in folder.read_manifest()["artifacts"] if each["path"].endswith(".safetensors")],
        "data": {
            "file": Path(data).name,
            "rows_sha256": digest,
            "rows": len(shaped.examples),
            "overlap": overlap.values(),
            "dropped": counts,
            "asked": len(asked.rows),
        },
        "answers": kind,
        "measures": measures,
        "notes": notes,
    }
    with folder.held():
        make_folder(folder.evaluations)
        write_json(written, found)
    return {**found, "written": str(written)}


def _unread(shaped: ShapedRows, data: str) -> list[str]:
    columns = ", ".join(shaped.ignored_columns)
    return [f"{data}: columns that were not read: {columns}"] if columns else []


def _unseen(prepared: Prepared, examples: Sequence[Example], limit: int) -> tuple[tuple[Example, ...], Overlap]:
    """So many rows, spread over the file, that no training row is like; and what training repeats of those looked at.

    What is the same word for word is looked for among all rows, what is nearly the same among those that are taken.
    """
    data = prepared.plan.config.data
    learned, _ = hold_out(
        read_shaped(prepared.plan.config, "train").examples,
        data.valid_fraction or 0.0,
        prepared.plan.config.training.seed,
    )
    if data.rehearsal is not None:
        learned = join(learned, read_shaped(prepared.plan.config, "rehearsal").examples)
    overlap = find_overlap(examples, learned)
    twins, compared = list(overlap.twins), set(overlap.compared)
    known = {twin.row for twin in twins}
    left = [example for example in examples if example.where not in known]
    taken = left[:: max(1, len(left) // limit)][:limit]
    others = [example for example in taken if example.where not in compared]
    for start in range(0, len(others), COMPARED):
        more = find_overlap(others[start : start + COMPARED], learned)
        twins += more.twins
        compared |= more.compared
    found = Overlap(len(examples), tuple(twins), frozenset(compared))
    return tuple(example for example in taken if example.where in found.unseen), found


def _ask(prepared: Prepared, shaped: ShapedRows, data: str) -> tuple[_OnFile, AnswerKind, dict[str, int]]:
    """What these rows can be asked, whether their answers are exact, and why some of them are not asked.

    Raises:
        DataError: no row is left.
    """
    if not shaped.examples:
        raise DataError(
            f"every row of {data} stands in the rows that the run was trained on, or is nearly one of them: nothing is "
            "left to measure on",
            hint="name rows that were not trained on",
        )
    encoded = prepared.encoder.encode(shaped, prepared.plan)
    if not encoded.rows:
        raise DataError(f"no row of {data} can be asked: {encoded.counts.dropped}", hint="shorten or mend its rows")
    asked = {row.where for row in encoded.rows}
    examples = [example for example in shaped.examples if example.where in asked]
    talks = [*prepared.encoder.as_asked(examples)]
    wanted = "open" if prepared.pairs else prepared.plan.config.judge.answers
    kind: AnswerKind = wanted if wanted != "auto" else answer_kind(survey_repeats(examples))
    questions: tuple[Question, ...] = ()
    if kind == "exact":
        questions = trained_questions(prepared.encoder, talks, prepared.plan, count=len(talks))
    matching = match_rows(prepared, talks, f"file {data}", _MATCHED) if kind == "open" and not prepared.pairs else None
    return _OnFile(encoded.rows, questions, matching), kind, encoded.counts.dropped


def _look(session: Session, prepared: Prepared, asked: _OnFile) -> _Look:
    losses = tuple(row_losses(session, asked.rows).tolist())
    matched = asked.matching.look(session) if asked.matching else None
    return _Look(losses, score(session, prepared, asked.questions), matched, _leads(session, asked))


def _leads(session: Session, asked: _OnFile) -> tuple[float, ...]:
    pairs = [(row, row.rejected) for row in asked.rows if row.rejected is not None]
    chosen, rejected = (row_sums(session, [pair[side] for pair in pairs]) for side in (0, 1))
    return tuple((rejected - chosen).tolist())


def _measures(prepared: Prepared, asked: _OnFile, base: _Look, tuned: _Look) -> list[dict[str, Any]]:
    """The measures that the rows allow, each of the base and of the tuned model."""
    if prepared.pairs:
        return [_loss(asked, base, tuned), _preferred(base, tuned, prepared.plan.config.training.dpo_beta)]
    found = [_loss(asked, base, tuned), _likelier(base, tuned)]
    if base.scores and tuned.scores:
        found.append(_exact(base.scores, tuned.scores))
    if base.matched and tuned.matched:
        found.append(_told_apart(base.matched, tuned.matched))
    return found


def _loss(asked: _OnFile, base: _Look, tuned: _Look) -> dict[str, Any]:
    weights = [row.target_count for row in asked.rows]
    means = [sum(map(mul, look.losses, weights)) / sum(weights) for look in (base, tuned)]
    moves = [after - before for before, after in zip(base.losses, tuned.losses, strict=True)]
    return {
        "id": "loss",
        "title": "Loss per trained token, in nats",
        "base": means[0],
        "tuned": means[1],
        "count": len(moves),
        "tokens": sum(weights),
        "difference": fmean(moves),
        "difference_interval": mean_interval(moves),
        "of": "the difference is a row's mean, with its 95% interval over rows (Student's t)",
    }


def _likelier(base: _Look, tuned: _Look) -> dict[str, Any]:
    moves = Moves.of(Paired(base.losses, tuned.losses), EFFECT_FLOOR * fmean(base.losses))
    return {
        "id": "likelier",
        "title": "Rows that got likelier",
        "outcome": moves.outcome,
        "base": None,
        "tuned": moves.fell / moves.count,
        "tuned_interval": wilson_interval(moves.fell, moves.count),
        "count": moves.count,
        "less_likely": moves.rose / moves.count,
        "of": f"by more than {moves.floor:.2g} nats; passed: more than half of the rows, not by chance (sign test)",
    }


def _preferred(base: _Look, tuned: _Look, beta: float) -> dict[str, Any]:
    """In how many pairs the chosen answer is the likelier one; the outcome is of those in which it gained."""
    moves = gains_of([after - before for before, after in zip(base.leads, tuned.leads, strict=True)], beta)
    return {
        "id": "preferred",
        "title": "Chosen answer the likelier one",
        "outcome": moves.outcome,
        **_shares(sum(lead > 0 for lead in base.leads), sum(lead > 0 for lead in tuned.leads), moves.count),
        "gained": moves.fell / moves.count,
        "gained_interval": wilson_interval(moves.fell, moves.count),
        "of": f"passed: it gained on the rejected one by more than {moves.floor:.2g} nats in more than half of the "
        "pairs, not by chance (sign test)",
    }


def _exact(base: Scores, tuned: Scores) -> dict[str, Any]:
    verdict = judge_signed(LearningEvidence(base, tuned))
    pairs = list(zip(base.answers, tuned.answers, strict=True))
    return {
        "id": "exact",
        "title": "Answers right word for word",
        "outcome": verdict.outcome,
        **_shares(base.right, tuned.right, len(pairs)),
        "better": sum(new.right and not old.right for old, new in pairs),
        "worse": sum(old.right and not new.right for old, new in pairs),
        "of": f"passed: {verdict.allowed}",
        "answers": [asdict(new) | {"base": old.given} for old, new in pairs],
    }


def _told_apart(base: Matched, tuned: Matched) -> dict[str, Any]:
    found = MatchingEvidence(base.first, tuned.first, CHOICES)
    verdict = judge_matching("claim-association", found)
    return {
        "id": "matching",
        "title": f"Own answer the likeliest of {CHOICES}",
        "outcome": verdict.outcome,
        **_shares(sum(found.base), sum(found.tuned), len(found.base)),
        "better": verdict.numbers["better"],
        "worse": verdict.numbers["worse"],
        "of": f"passed: {verdict.allowed}",
    }


def _shares(base: int, tuned: int, count: int) -> dict[str, Any]:
    return {
        "base": base / count,
        "base_interval": wilson_interval(base, count),
        "tuned": tuned / count,
        "tuned_interval": wilson_interval(tuned, count),
        "count": count,
        "difference": (tuned - base) / count,
        "difference_interval": difference_interval((tuned, count), (base, count)),
    }
