"""Holds what llama.cpp makes of a GGUF file to what the trainer makes of the model: tokens, logits, greedy text."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.evidence.drift import Bound, NextTokens, distance, divergence, first_difference, log_softmax
from finetune.export.blueprint import Blueprint
from finetune.export.by_name import LoadedTokenizer
from finetune.export.llama_cpp import Answers, Continuation, Questions
from finetune.export.outtypes import Outtype
from finetune.export.read_back import Check
from finetune.export.rounded import RoundingBounds
from finetune.ports import Session, Tokenizer

Array = NDArray[Any]
SHOWN = 60


@dataclass(frozen=True, slots=True)
class BaselineModel:
    """What the trainer knows of the model: how it cuts text, and what it computes.

    `stops` are the ids at which an answer ends, those at which llama.cpp stops by itself among them; `loaded` is the
    tokenizer with llama.cpp's control tokens, some of which are such by their names alone.
    """

    tokenizer: Tokenizer
    loaded: LoadedTokenizer
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
    whole = [[*prompt, *more] for prompt, more in zip(kept, ids, strict=True)]
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        from safetensors.numpy import load_file

        path = Path(folder) / "logits.safetensors"
        trainer.session.save_logits(whole, path)
        stored = load_file(path)
    # What follows a prompt is seen in passing on the way through its continuation: no token looks ahead.
    sequences = [sequence for prompt, both in zip(kept, whole, strict=True) for sequence in (prompt, both)]
    logits = tuple(stored[str(index // 2)][: len(each)] for index, each in enumerate(sequences))
    plain_id = trainer.tokenizer.encode_content("a")[-1]
    questions = Questions(texts, kept, sequences, steps, context, plain_id)
    return questions, BaselineAnswers(tuple(map(tuple, ids)), logits)


def bound_of(bounds: RoundingBounds, planned: Blueprint, outtype: Outtype, *, from_table: bool) -> Bound:
    """How far llama.cpp may be off on a file of these types; `from_table`: it looks the activation up in a table.

    The table is of f16 numbers: it rounds each hidden unit once, as f16 weights round each weight.
    """
    if planned.storages or not from_table:
        return bounds.of(outtype, planned.storages)
    matrices = [each.weight for each in planned.tensors if each.weight and len(each.shape) > 1]
    return bounds.of("f16", dict.fromkeys(matrices, "f16"))


def compare(
    trainer: BaselineModel, questions: Questions, wanted: BaselineAnswers, answers: Answers, *, bound: Bound
) -> tuple[Check, ...]:
    """One check for each stage, in the order in which a fault of one shows in the next."""
    return (
        _compare_tokens(trainer, questions, answers),
        _compare_logits(questions, wanted, answers.following, bound),
        _compare_text(trainer, questions, wanted, answers.continuations, bound),
    )


def _compare_tokens(trainer: BaselineModel, questions: Questions, answers: Answers) -> Check:
    tokenizer = trainer.tokenizer
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    problems: list[str] = []
    for index, text in enumerate(questions.texts):
        plain = trainer.loaded.plain(text)
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
    questions: Questions, wanted: BaselineAnswers, following: Sequence[NextTokens], bound: Bound
) -> Check:
    worst, first = 0.0, ""
    kl = float(np.mean([divergence(row[-1], told) for row, told in zip(wanted.logits, following, strict=True)]))
    for index, (logits, told) in enumerate(zip(wanted.logits, following, strict=True)):
        row = logits[-1]
        off_by = distance(row, told)
        worst = max(worst, off_by)
        if not off_by <= bound.distance and not first:
            own = log_softmax(row)[told.ids]
            off = np.abs(own - told.logs)
            place = int(off.argmax())
            first = (
                f"after {len(questions.sequences[index])} tokens of sequence {index}, the log probability of token "
                f"{told.ids[place]} is {own[place]:.4f} here and {told.logs[place]:.4f} in llama.cpp"
            )
    if not kl <= bound.kl and not first:
        first = f"the mean KL divergence is {kl:.2g} nats"
    measured = f"max log-prob error {worst:.2g} (in logit std) over {len(following)} positions, KL {kl:.2g} nats"
    return Check("logits", measured, f"at most {bound.distance:.2g} and {bound.kl:.2g}, {bound.why}", first)


def _compare_text(
    trainer: BaselineModel,
    questions: Questions,
    wanted: BaselineAnswers,
    continuations: Sequence[Continuation],
    bound: Bound,
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
        if float(logits.max() - logits[theirs]) <= 2 * bound.distance * float(logits.std()):
            ties += 1
        elif not first:
            first = (
                f"prompt {index}: token {place} is {_at(own, place)} here and {_at(told.ids, place)} in llama.cpp, "
                f"which was {float(logits.max() - logits[theirs]):.3f} less likely here"
            )
    measured = f"{same} of {len(continuations)} equal, {ties} diverge at near-ties"
    return Check("greedy text", measured, "equal, or diverging at a near-tie", first)


def _text_problem(trainer: BaselineModel, index: int, own: Sequence[int], told: Continuation) -> str:
    """Whether the same ids are another text."""
    text = trainer.loaded.decode(own)
    whole = "\ufffd" not in text + told.text and not text.endswith(" ")
    if not whole or text.strip() == told.text.strip():
        return ""
    return f"prompt {index}: the same ids are {text[:SHOWN]!r} here and {told.text[:SHOWN]!r} in llama.cpp"


def _at(ids: Sequence[int], place: int) -> str:
    return str(ids[place]) if place < len(ids) else "the end"
