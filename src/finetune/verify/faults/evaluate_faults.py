"""Faults of looking at a model: held-out losses and answers."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from finetune.backends.reference.session import ReferenceSession
from finetune.chat.encoder import Encoder
from finetune.chat.fit import Encoded
from finetune.config.resolve import Plan
from finetune.data.shape import Example, ShapedRows
from finetune.events import Event
from finetune.evidence import asked, observe
from finetune.evidence import evaluate as on_file
from finetune.ports import Objective, Session
from finetune.records import Batch, TokenizedRow
from finetune.training import loop, prepare
from finetune.training.prepare import Prepared
from finetune.verify.faults.fault import fault, in_place_of, plant, planted_by
from finetune.verify.faults.sessions import Through, pad_of, plant_session, trainable
from finetune.verify.trainers import ours

Asked = Callable[..., list[list[int]]]
Stepping = Callable[..., Iterator[Event]]
Sides = tuple[list[Example], list[Example]]
Measuring = Callable[..., tuple[float, int]]
Prompts = Sequence[Sequence[int]]
Answers = list[list[int]]


@fault("A260", "eval.mean_of_batch_means", "transformers #39241, #24839")
@in_place_of("mean_loss", loop, observe, ours)
def _mean_of_batch_means(
    right: Measuring, session: Session, batches: Sequence[Batch], *objective: Objective
) -> tuple[float, int]:
    """The held-out loss is the mean of its batches' means."""
    each = [right(session, [batch], *objective) for batch in batches]
    return sum(loss for loss, _ in each) / len(each), sum(count for _, count in each)


def _fixed(wrong: Callable[[list[Batch], int], list[Batch]]) -> None:
    """Let held-out batches be others: `wrong` is given all of them and how many rows one has."""

    def batches(right: Callable[..., list[Batch]], rows: Sequence[TokenizedRow], size: int) -> list[Batch]:
        return list(wrong(right(rows, size), size))

    for owner in (asked, prepare):
        plant(owner, "fixed_batches", batches)


@fault("A262", "eval.padding_samples_counted", "accelerate #226, TRL #7010")
@planted_by(_fixed)
def _filled_up(batches: list[Batch], size: int) -> list[Batch]:
    """The last held-out batch is filled up with rows that come twice, and these count."""
    rows = [row for batch in batches for row in batch.rows]
    return [replace(batch, rows=(*batch.rows, *rows)[: max(size, len(batch.rows))]) for batch in batches]


@fault("A263", "eval.dropout_on", "signet-trainer #34")
@planted_by(plant_session, "loss")
def _dropout_on(right: Callable[..., float], session: Session, batch: Batch, *objective: Objective) -> float:
    """Dropout is on while the held-out loss is taken."""
    with trainable(session):
        return float(session.accumulate(batch, 0.0, *objective))


@fault("A264", "eval.mode_not_restored", "unsloth #11238", backends=("reference",))
def _mode_not_restored() -> None:
    """After the first look at the held-out loss dropout stays off for good."""
    resting: set[int] = set()

    def loss(right: Callable[..., float], session: Session, *given: object) -> float:
        resting.add(id(session))
        return float(right(session, *given))

    def accumulate(right: Callable[..., float], session: ReferenceSession, *given: object) -> float:
        adapter = session.adapter
        if adapter is None or id(session) not in resting:
            return float(right(session, *given))
        session.adapter = replace(adapter, target=replace(adapter.target, dropout=0.0))
        try:
            return float(right(session, *given))
        finally:
            session.adapter = adapter

    plant_session("loss", loss)
    plant_session("accumulate", accumulate)


@fault("A265", "eval.bos_missing", "lm-eval #1465, #3295")
@in_place_of("encode_held_out", prepare)
def _first_token_missing(right: Callable[..., Encoded | None], *given: object) -> Encoded | None:
    """Held-out rows lack the token that text begins with in training."""
    found = right(*given)
    if found is None:
        return None
    rows = tuple(replace(row, ids=row.ids[1:], trained=row.trained[1:]) for row in found.rows)
    return replace(found, rows=rows)


@fault("A267", "eval.context_overflow", "torchtune #1773", backends=("reference",))
@planted_by(plant_session, "generate")
def _context_overflow(right: Asked, session: ReferenceSession, *given: object) -> Answers:
    """An answer goes on beyond what the model reads."""
    shape = session.shape
    session.shape = replace(shape, max_position_embeddings=10**6)
    try:
        return right(session, *given)
    finally:
        session.shape = shape


@fault("A269", "eval.prompt_in_prediction", "transformers #32346, TRL #862")
@planted_by(plant_session, "generate")
def _prompt_in_answer(right: Asked, session: Session, prompts: Prompts, *rest: object) -> Answers:
    """An answer begins with its prompt."""
    answers = right(session, prompts, *rest)
    return [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]


@fault("A269b", "eval.answers_in_wrong_order")
@planted_by(plant_session, "generate")
def _answers_in_wrong_order(right: Asked, session: Session, prompts: Prompts, *rest: object) -> Answers:
    """Prompts are sorted by length to be asked together, and the answers are not put back."""
    return list(right(session, sorted(prompts, key=len), *rest))


@fault("A269c", "eval.pads_are_read", "transformers #26569")
@fault("A108", "pad.side_for_generation", "transformers #26569")
@planted_by(plant_session, "generate")
def _pads_are_read(right: Asked, session: Session, prompts: Prompts, *rest: object) -> Answers:
    """Prompts that are asked together are padded where the answer begins, and the padding is read."""
    longest = max(map(len, prompts))
    padded = [[*prompt, *[pad_of(session)] * (longest - len(prompt))] for prompt in prompts]
    return list(right(session, padded, *rest))


@fault("A269d", "eval.prompt_forgotten")
@planted_by(plant_session, "generate")
def _prompt_forgotten(
    right: Asked, session: Session, prompts: Sequence[Sequence[int]], most: int, *rest: object
) -> list[list[int]]:
    """After the first word of an answer the keys of its prompt are lost."""
    answers = right(session, prompts, most, *rest)
    return [
        [*said[:1], *right(session, [said[:1]], len(said) - 1, *rest)[0]] if len(said) > 1 else said for said in answers
    ]


@fault("A270", "eval.empty_set", "torchtitan #4301")
def _partial_batches_left_out() -> None:
    """Held-out rows that do not fill a batch are left out, all of them where there are few."""
    _fixed(lambda batches, size: [batch for batch in batches if len(batch.rows) == size])


@fault("A272", "eval.train_log_unweighted", "mlx-lm d78bf58")
@in_place_of("training_step", loop)
def _log_unweighted(right: Stepping, session: Session, window: Sequence[Batch], *rest: object) -> Iterator[Event]:
    """The loss that is told of a step is the mean of its batches' means, while what is learned is not."""
    targets = sum(batch.target_count for batch in window)

    def accumulate(batch: Batch, weight: float, *objective: Objective) -> float:
        loss = session.accumulate(batch, weight, *objective)
        return float(loss / batch.target_count / len(window) * targets)

    yield from right(Through(session, accumulate=accumulate), window, *rest)


@fault("A274", "eval.hidden_split_default", "litgpt #2204")
@in_place_of("hold_out", prepare)
def _hidden_split(right: Callable[..., Sides], examples: Sequence[Example], fraction: float, seed: int) -> Sides:
    """A part of the rows is held out of training although none was to be."""
    return right(examples, fraction or 0.3, seed)


@fault("A275", "eval.sum_as_mean")
@in_place_of("mean_loss", loop, observe, ours)
def _sum_as_mean(right: Measuring, *given: object) -> tuple[float, int]:
    """The held-out loss is a sum where a mean is told."""
    loss, count = right(*given)
    return loss * count, count


@fault("A276", "eval.file_base_with_adapter")
@in_place_of("base_of_run", on_file)
def _base_keeps_its_adapter(right: Callable[..., object], prepared: Prepared, session: Session) -> object:
    """On a file the base is measured with the adapter on it."""
    return contextlib.nullcontext(session)


@fault("A276b", "eval.file_loss_spread_over_prompts")
@in_place_of("row_losses", on_file)
def _loss_spread_over_prompts(
    right: Callable[..., NDArray[np.float64]], session: Session, rows: Sequence[TokenizedRow]
) -> NDArray[np.float64]:
    """On a file a row's loss is divided by all of its tokens, and not by those that are learned."""
    return right(session, rows) * [row.target_count / len(row.ids) for row in rows]


@fault("A263b", "eval.draws_dice")
@planted_by(plant_session, "loss")
def _looking_draws(right: Callable[..., float], session: Session, *given: object) -> float:
    """To take a held-out loss turns the dice on that dropout is drawn with."""
    session.reseed(1)
    return float(right(session, *given))


@fault("A266", "eval.limit_ignored")
@in_place_of("encode_held_out", prepare)
def _held_out_without_limit(
    right: Callable[..., Encoded | None], encoder: Encoder, plan: Plan, held: ShapedRows
) -> Encoded | None:
    """Held-out rows are not measured against the limit of length."""
    tokens = plan.config.tokens.model_copy(update={"max_length": 256})
    return right(encoder, replace(plan, config=plan.config.model_copy(update={"tokens": tokens})), held)


@fault("A269e", "eval.first_batch_answers_all")
@planted_by(plant_session, "generate")
def _first_answers_again(right: Asked, session: Session, prompts: Prompts, *rest: object) -> Answers:
    """Of questions that are more than are answered at once those beyond get the answers of the first."""
    answers = list(right(session, prompts[:64], *rest))
    return [answers[number % 64] for number in range(len(prompts))]


@fault("A277", "eval.rows_run_together", "axolotl #3465")
def _held_out_rows_run_together() -> None:
    """Held-out rows are packed into one text, so that each sees those before it."""

    def joined(batch: Batch) -> Batch:
        ids = tuple(token for row in batch.rows for token in row.ids)
        marks = tuple(mark and place > 0 for row in batch.rows for place, mark in enumerate(row.trained))
        return Batch((replace(batch.rows[0], ids=ids, trained=marks),))

    _fixed(lambda batches, size: [joined(batch) for batch in batches])


@fault("A278", "eval.spread_over_prompts", "ms-swift #9152")
@in_place_of("mean_loss", loop, observe, ours)
def _spread_over_prompts(
    right: Measuring, session: Session, batches: Sequence[Batch], *objective: Objective
) -> tuple[float, int]:
    """The held-out loss is divided by all tokens, those of prompts among them."""
    loss, count = right(session, batches, *objective)
    return loss * count / sum(batch.token_count for batch in batches), count
