"""Faults of looking at a model: held-out losses and answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from finetune.backends.reference.session import ReferenceSession
from finetune.chat.fit import Encoded
from finetune.data.shape import Example
from finetune.events import Event
from finetune.evidence import observe
from finetune.ports import Objective, Session
from finetune.records import Batch, TokenizedRow
from finetune.training import loop, prepare
from finetune.verify.faults.fault import fault, plant
from finetune.verify.faults.sessions import Through, pad_of, plant_session, trainable
from finetune.verify.trainers import ours

Asked = Callable[..., list[list[int]]]
Stepping = Callable[..., Iterator[Event]]
Sides = tuple[list[Example], list[Example]]


@fault(
    "A260",
    "eval.mean_of_batch_means",
    real="transformers #39241, #24839",
    what="The held-out loss is the mean of its batches' means.",
)
def mean_of_batch_means() -> None:
    """A small last batch weighs as much as any."""

    def mean(right: Callable[..., tuple[float, int]], session: Session, batches: Sequence[Batch]) -> tuple[float, int]:
        each = [right(session, [batch]) for batch in batches]
        return sum(loss for loss, _ in each) / len(each), sum(count for _, count in each)

    for owner in (loop, observe, ours):
        plant(owner, "mean_loss", mean)


def _fixed(wrong: Callable[[list[Batch], int], list[Batch]]) -> None:
    """Let held-out batches be others: `wrong` is given all of them and how many rows one has."""

    def batches(right: Callable[..., list[Batch]], rows: Sequence[TokenizedRow], size: int) -> list[Batch]:
        return list(wrong(right(rows, size), size))

    for owner in (observe, prepare):
        plant(owner, "fixed_batches", batches)


@fault(
    "A262",
    "eval.padding_samples_counted",
    real="accelerate #226, TRL #7010",
    what="The last held-out batch is filled up with rows that come twice, and these count.",
)
def filled_up() -> None:
    """Batches are all of one size."""

    def wrong(batches: list[Batch], size: int) -> list[Batch]:
        rows = [row for batch in batches for row in batch.rows]
        return [replace(batch, rows=(*batch.rows, *rows)[: max(size, len(batch.rows))]) for batch in batches]

    _fixed(wrong)


@fault("A263", "eval.dropout_on", real="signet-trainer #34", what="Dropout is on while the held-out loss is taken.")
def dropout_on() -> None:
    """The model is never told that it is not training."""

    def loss(right: Callable[..., float], session: Session, batch: Batch) -> float:
        with trainable(session):
            return float(session.accumulate(batch, 0.0))

    plant_session("loss", loss)


@fault(
    "A264",
    "eval.mode_not_restored",
    real="unsloth #11238",
    what="After the first look at the held-out loss dropout stays off for good.",
    backends=("reference",),
)
def mode_not_restored() -> None:
    """eval() without train()."""
    resting: set[int] = set()

    def loss(right: Callable[..., float], session: Session, batch: Batch) -> float:
        resting.add(id(session))
        return float(right(session, batch))

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


@fault(
    "A265",
    "eval.bos_missing",
    real="lm-eval #1465, #3295",
    what="Held-out rows lack the token that text begins with in training.",
)
def first_token_missing() -> None:
    """Two paths make ids."""

    def held(right: Callable[..., Encoded | None], *given: object) -> Encoded | None:
        found = right(*given)
        if found is None:
            return None
        rows = tuple(replace(row, ids=row.ids[1:], trained=row.trained[1:]) for row in found.rows)
        return replace(found, rows=rows)

    plant(prepare, "encode_held_out", held)


@fault(
    "A267",
    "eval.context_overflow",
    real="torchtune #1773",
    what="An answer goes on beyond what the model reads.",
    backends=("reference",),
)
def context_overflow() -> None:
    """Nobody counts prompt and answer together."""

    def generate(right: Asked, session: ReferenceSession, *given: object) -> list[list[int]]:
        shape = session.shape
        session.shape = replace(shape, max_position_embeddings=10**6)
        try:
            return right(session, *given)
        finally:
            session.shape = shape

    plant_session("generate", generate)


@fault(
    "A269",
    "eval.prompt_in_prediction",
    real="transformers #32346, TRL #862",
    what="An answer begins with its prompt.",
)
def prompt_in_answer() -> None:
    """The whole sequence is scored."""

    def generate(right: Asked, session: Session, prompts: Sequence[Sequence[int]], *rest: object) -> list[list[int]]:
        answers = right(session, prompts, *rest)
        return [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]

    plant_session("generate", generate)


@fault(
    "A269b",
    "eval.answers_in_wrong_order",
    real="",
    what="Prompts are sorted by length to be asked together, and the answers are not put back.",
)
def answers_in_wrong_order() -> None:
    """They come in the order in which they were asked."""

    def generate(right: Asked, session: Session, prompts: Sequence[Sequence[int]], *rest: object) -> list[list[int]]:
        return list(right(session, sorted(prompts, key=len), *rest))

    plant_session("generate", generate)


@fault(
    "A269c",
    "eval.pads_are_read",
    real="transformers #26569",
    what="Prompts that are asked together are padded where the answer begins, and the padding is read.",
)
def pads_are_read() -> None:
    """The shorter ones are asked with more than they say."""

    def generate(right: Asked, session: Session, prompts: Sequence[Sequence[int]], *rest: object) -> list[list[int]]:
        longest = max(map(len, prompts))
        padded = [[*prompt, *[pad_of(session)] * (longest - len(prompt))] for prompt in prompts]
        return list(right(session, padded, *rest))

    plant_session("generate", generate)


@fault(
    "A270",
    "eval.empty_set",
    real="torchtitan #4301",
    what="Held-out rows that do not fill a batch are left out, all of them where there are few.",
)
def partial_batches_left_out() -> None:
    """drop_last."""
    _fixed(lambda batches, size: [batch for batch in batches if len(batch.rows) == size])


@fault(
    "A272",
    "eval.train_log_unweighted",
    real="mlx-lm d78bf58",
    what="The loss that is told of a step is the mean of its batches' means, while what is learned is not.",
)
def log_unweighted() -> None:
    """The curve is that of something else."""

    def step(right: Stepping, session: Session, window: Sequence[Batch], *rest: object) -> Iterator[Event]:
        targets = sum(batch.target_count for batch in window)

        def accumulate(batch: Batch, weight: float, *objective: Objective) -> float:
            loss = session.accumulate(batch, weight, *objective)
            return float(loss / batch.target_count / len(window) * targets)

        yield from right(Through(session, accumulate=accumulate), window, *rest)

    plant(loop, "training_step", step)


@fault(
    "A274",
    "eval.hidden_split_default",
    real="litgpt #2204",
    what="A part of the rows is held out of training although none was to be.",
)
def hidden_split() -> None:
    """At least one of two."""

    def hold(right: Callable[..., Sides], examples: Sequence[Example], fraction: float, seed: int) -> Sides:
        return right(examples, fraction or 0.3, seed)

    plant(prepare, "hold_out", hold)


@fault("A275", "eval.sum_as_mean", real="", what="The held-out loss is a sum where a mean is told.")
def sum_as_mean() -> None:
    """It grows with the rows."""

    def mean(right: Callable[..., tuple[float, int]], session: Session, batches: Sequence[Batch]) -> tuple[float, int]:
        loss, count = right(session, batches)
        return loss * count, count

    for owner in (loop, observe, ours):
        plant(owner, "mean_loss", mean)
