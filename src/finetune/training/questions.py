"""Chooses what a run is asked and measured on beside its rows, less what stands in the rows that it trains on."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from finetune.chat.encoder import Encoder
from finetune.chat.fit import Encoded
from finetune.config import Plan
from finetune.data.overlap import Overlap, find_overlap
from finetune.data.shape import Example, ShapedRows
from finetune.data.sources import shown_names
from finetune.data.stored import pick
from finetune.errors import counted
from finetune.records import Conversation, Document, Question


def without_trained(
    shaped: ShapedRows, training: Sequence[Example], name: str, notes: list[str]
) -> tuple[ShapedRows, Overlap]:
    """The rows to hold out less those whose words are trained on: these are counted as dropped, and noted."""
    overlap = find_overlap(shaped.examples, training)
    notes += overlap.sentences(name)
    trained = overlap.trained()
    dropped = dict(Counter(shaped.dropped) + Counter(trained.values()))
    places = shaped.dropped_at | {reason: where for where, reason in reversed(trained.items())}
    if not trained:
        return shaped, overlap
    left = [place for place, example in enumerate(shaped.examples) if example.where not in trained]
    examples = pick(shaped.examples, left)
    return replace(shaped, examples=examples, dropped=dropped, dropped_at=places), overlap


def unseen_rows(encoder: Encoder, held: Sequence[Example], held_out: Encoded, overlap: Overlap) -> tuple[Example, ...]:
    """The held-out rows that are measured and that no training row is like, each as it is asked."""
    unseen = overlap.unseen
    measured = {row.where for row in held_out.rows if row.where in unseen}
    left = [example for example in held if example.where in measured]
    talks = {talk.where: talk for talk in encoder.as_asked(left)}
    asked = (example if isinstance(example, Document) else talks.get(example.where) for example in left)
    return tuple(example for example in asked if example)


def trained_questions(
    encoder: Encoder, conversations: Sequence[Conversation], plan: Plan, *, count: int
) -> tuple[Question, ...]:
    """Up to `count` conversations whose answer is short enough to be compared word for word, chosen by the seed.

    None of pairs: a chosen answer is better than another, and not the one right wording.
    """
    if plan.config.training.objective == "dpo":
        return ()
    most, row = plan.config.evaluation.max_new_tokens, plan.config.tokens.max_length
    assert row is not None
    order = list(range(len(conversations)))
    random.Random(f"questions-{plan.config.training.seed}").shuffle(order)
    chosen: dict[int, Question] = {}
    for index in order:
        if len(chosen) == count:
            break
        # A text too long by itself is so whatever the template adds to it: most rows of prose are not even rendered.
        # What names a control token may be one, and then takes one id.
        pieces = encoder.tokenizer.split_control(conversations[index].messages[-1].content.strip())[::2]
        if sum(len(encoder.tokenizer.encode_content(piece)) for piece in pieces) > most:
            continue
        question = encoder.question(conversations[index])
        # The answer and its terminator must fit into what is generated, and beside the prompt into a row.
        if question.answer and len(question.answer) + 1 <= min(most, row - len(question.ids)):
            chosen[index] = question
    return tuple(chosen[index] for index in sorted(chosen))


def retention_questions(
    encoder: Encoder, examples: Iterable[Example], overlap: Overlap, plan: Plan, notes: list[str]
) -> tuple[Question, ...]:
    """The questions whose answers the model must keep, less those of which training says the prompt or the answer."""
    name = shown_names(plan.config.data.retention or "")
    notes += overlap.sentences(f"data.retention ({name})")
    conversations, refused = encoder.asked([each for each in examples if each.where not in overlap.repeated])
    if refused:
        unasked = counted(len(refused), "row", "is/are")
        notes.append(f"{name}: {unasked} not asked, since the template refuses: {refused[0][1].message}")
    return trained_questions(encoder, conversations, plan, count=plan.config.evaluation.retention_questions)
