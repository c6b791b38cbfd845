"""Holds what llama.cpp makes of a GGUF file to what the trainer makes of the model: tokens, logits, greedy text."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.evidence.drift import NextTokens, distance, first_difference, log_softmax
from finetune.export.llama_cpp import Answers, Continuation, Questions
from finetune.export.outtypes import Outtype
from finetune.export.read_back import Check
from finetune.ports import Session, Tokenizer

Array = NDArray[Any]
BOUNDS: dict[Outtype, float] = {
    "f32": 1e-4,
    "f16": 0.01,
    "bf16": 0.08,
    "q8_0": 0.2,
    "q6_k": 0.3,
    "q5_k_m": 0.5,
    "q4_k_m": 0.8,
}
"""How far log probabilities may be off (root mean square over the likeliest tokens), in spreads of the logits.

Measured on both shipped models and 15 random ones of nine families: at most 3e-6, 0.003, 0.022 and 0.07; on 8 random
ones with rows of whole blocks: at most 0.05 in q8_0, 0.17, 0.33 and 0.49 in the three below. Random weights bear
quantising worse than trained ones: the shipped Llama is off by 0.04 in q4_k_m.
"""
TABLE_BOUND = 2e-3
"""The least bound where llama.cpp looks up GELU in a table of f16 numbers; measured: at most 5.2e-4."""
SHOWN = 60


@dataclass(frozen=True, slots=True)
class BaselineModel:
    """What the trainer knows of the model: how it cuts text, and what it computes.

    `stops` are the ids at which an answer ends, those at which llama.cpp stops by itself among them.
    """

    tokenizer: Tokenizer
    session: Session
    stops: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BaselineAnswers:
    """What the trainer answers: greedy ids for each prompt, and logits after each token of each sequence."""

    ids: tuple[tuple[int, ...], ...]
    logits: tuple[Array, ...]


def prepare_questions(
    trainer: BaselineModel, texts: Sequence[str], prompts: Sequence[Sequence[int]], *, steps: int, context: int
) -> tuple[Questions, BaselineAnswers]:
    """What to ask llama.cpp, and what the trainer answers: next tokens after each prompt and its continuation."""
    kept = [list(prompt[: context - steps - 1]) for prompt in prompts if prompt]
    ids = trainer.session.generate(kept, steps, trainer.stops)
    sequences = [sequence for prompt, more in zip(kept, ids, strict=True) for sequence in (prompt, [*prompt, *more])]
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        from safetensors.numpy import load_file

        path = Path(folder) / "logits.safetensors"
        trainer.session.save_logits(sequences, path)
        stored = load_file(path)
    logits = tuple(stored[str(index)].astype(np.float64) for index in range(len(sequences)))
    plain_id = trainer.tokenizer.encode_content("a")[-1]
    questions = Questions(texts, kept, sequences, steps, context, plain_id)
    return questions, BaselineAnswers(tuple(map(tuple, ids)), logits)


def compare(
    trainer: BaselineModel, questions: Questions, wanted: BaselineAnswers, answers: Answers, *, bound: float
) -> tuple[Check, ...]:
    """One check for each stage, in the order in which a fault of one shows in the next."""
    return (
        _compare_tokens(trainer.tokenizer, questions, answers),
        _compare_logits(questions, wanted, answers.following, bound),
        _compare_text(trainer, questions, wanted, answers.continuations, bound),
    )


def _compare_tokens(tokenizer: Tokenizer, questions: Questions, answers: Answers) -> Check:
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    problems: list[str] = []
    for index, text in enumerate(questions.texts):
        plain = tokenizer.encode_content(text)
        for kind, own, theirs in (
            ("plain text", plain, answers.plain[index]),
            ("markup", tokenizer.encode_markup(text), answers.markup[index]),
            ("text with what is put around it", [*bos, *plain], answers.around[index]),
        ):
            if (place := first_difference(own, theirs)) is not None:
                problems.append(
                    f"{kind} {text[:SHOWN]!r}: token {place} is {_at(own, place)} here and "
                    f"{_at(theirs, place)} in llama.cpp"
                )
    count = 3 * len(questions.texts)
    return Check("token ids", f"{count - len(problems)} of {count} equal", "all equal", next(iter(problems), ""))


def _compare_logits(
    questions: Questions, wanted: BaselineAnswers, following: Sequence[NextTokens], bound: float
) -> Check:
    worst, first = 0.0, ""
    for index, (logits, told) in enumerate(zip(wanted.logits, following, strict=True)):
        row = logits[-1]
        off_by = distance(row, told)
        worst = max(worst, off_by)
        if not off_by <= bound and not first:
            own = log_softmax(row)[told.ids]
            off = np.abs(own - told.logs)
            place = int(off.argmax())
            first = (
                f"after {len(questions.sequences[index])} tokens of sequence {index}, the log probability of token "
                f"{told.ids[place]} is {own[place]:.4f} here and {told.logs[place]:.4f} in llama.cpp"
            )
    measured = f"off by {worst:.2g} spreads of the logits at {len(following)} places"
    return Check("logits", measured, f"at most {bound:g}", first)


def _compare_text(
    trainer: BaselineModel,
    questions: Questions,
    wanted: BaselineAnswers,
    continuations: Sequence[Continuation],
    bound: float,
) -> Check:
    """Greedy text differs only where two tokens are as good as equal: within what logits may be off."""
    same, ties, first = 0, 0, ""
    for index, (own, told) in enumerate(zip(wanted.ids, continuations, strict=True)):
        if (place := first_difference(own, told.ids)) is None:
            same += 1
            first = first or _text_problem(trainer, index, own, told)
            continue
        logits = wanted.logits[2 * index + 1][len(questions.prompts[index]) - 1 + place]
        theirs = told.ids[place] if place < len(told.ids) else max(trainer.stops, key=lambda stop: logits[stop])
        if float(logits.max() - logits[theirs]) <= 2 * bound * float(logits.std()):
            ties += 1
        elif not first:
            first = (
                f"prompt {index}: token {place} is {_at(own, place)} here and {_at(told.ids, place)} in llama.cpp, "
                f"which was {float(logits.max() - logits[theirs]):.3f} less likely here"
            )
    measured = f"{same} of {len(continuations)} equal, {ties} part where two tokens are as good as equal"
    return Check("greedy text", measured, "equal, or parting at a tie", first)


def _text_problem(trainer: BaselineModel, index: int, own: Sequence[int], told: Continuation) -> str:
    """Whether the same ids are another text."""
    text = trainer.tokenizer.decode(own)
    whole = "\ufffd" not in text + told.text and not text.endswith(" ")
    if not whole or text.strip() == told.text.strip():
        return ""
    return f"prompt {index}: the same ids are {text[:SHOWN]!r} here and {told.text[:SHOWN]!r} in llama.cpp"


def _at(ids: Sequence[int], place: int) -> str:
    return str(ids[place]) if place < len(ids) else "the end"
