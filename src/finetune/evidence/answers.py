"""Asks a model questions and scores what it says by exact match."""

import unicodedata
from collections.abc import Callable, Sequence

from finetune.ports import Session
from finetune.records import Answer, Question, Scores


def ask(
    session: Session,
    questions: Sequence[Question],
    decode: Callable[[Sequence[int]], str],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
) -> Scores:
    """Ask every question once, greedily, and score the answers by exact match after `normalise`."""
    return score(
        questions, session.generate([question.ids for question in questions], max_new_tokens, stop_ids), decode
    )


def score(
    questions: Sequence[Question], said: Sequence[Sequence[int]], decode: Callable[[Sequence[int]], str]
) -> Scores:
    """Score the ids that were said to each question by exact match after `normalise`."""
    answers = []
    for question, ids in zip(questions, said, strict=True):
        given = decode(ids).strip()
        right = normalise(given) == normalise(question.expected)
        answers.append(Answer(question.text, question.expected, given, right))
    return Scores(tuple(answers))


def normalise(text: str) -> str:
    """Text as it is compared: Unicode NFKC, case folded, white space collapsed, one closing full stop dropped."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.removesuffix(".").rstrip()
