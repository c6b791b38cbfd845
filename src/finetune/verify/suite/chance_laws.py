"""Laws that chance has a hand in: orders that differ, and what a model has learned to say."""

from random import Random
from typing import Annotated, Any

from pydantic import Field

from finetune.models.locate import locate_model
from finetune.verify.doors.answers import Epochs, Generated, TokenRows, TrainingResult
from finetune.verify.suite.cases import PLAIN, TINY, Pair, Rows
from finetune.verify.suite.catalogue import law
from finetune.verify.suite.chance import Chance
from finetune.verify.suite.trainer import Trainer
from finetune.verify.suite.verdicts import check

_ROWS = 5
_WORDS = ("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "heath")
SMALL_MODEL = "reference-llama"
"""The shipped model: small, and it has learned to read."""


class Shuffled(Rows):
    """Rows of one length, and the number that their order is drawn from."""

    seed: Annotated[int, Field(ge=0)]


def _shuffled(random: Random) -> Shuffled:
    rows = tuple(Pair(prompt=f"say {number}", completion=f"{number}") for number in range(_ROWS))
    return Shuffled(rows=rows, seed=random.randrange(1000))


_ORDERS = Chance(_shuffled, sound=0.95, broken=0.3, most=60)
"""Of five rows two orders are the same once in 120 times; a loader that reads the lengths first may have fewer."""


@law(
    "order.epochs",
    "Rows come in another order in the next epoch.",
    needs=["batches"],
    oracle="two shuffles of five rows are alike once in 120 times",
    cases=_ORDERS,
    cost=2,
)
def epochs_differ(trainer: Trainer, case: Shuffled) -> None:
    """The sequences of the first epoch do not come in that order in the second."""
    first, second = _orders(trainer, case, case.seed, epochs=2)
    check(first != second, expected="another order", got=f"{first} twice")


@law(
    "order.seeds",
    "Another seed is another order of rows.",
    needs=["batches"],
    oracle="two shuffles of five rows are alike once in 120 times",
    cases=_ORDERS,
    cost=2,
)
def seeds_differ(trainer: Trainer, case: Shuffled) -> None:
    """The first epochs of two seeds have other orders."""
    [first], [second] = (_orders(trainer, case, seed, epochs=1) for seed in (case.seed, case.seed + 1))
    check(first != second, expected=f"another order with seed {case.seed + 1}", got=f"{first} with both")


def _orders(trainer: Trainer, case: Shuffled, seed: int, *, epochs: int) -> list[list[list[int]]]:
    """The sequences of each epoch, in order."""
    settings = {**PLAIN, "training.batch_size": 1, "training.seed": seed}
    given = {"model": trainer.model(TINY), "settings": settings, "rows": case.values}
    dealt = trainer.ask("batches", Epochs, epochs=epochs, **given)
    check(len(dealt.epochs) == epochs, expected=f"{epochs} epochs", got=f"{len(dealt.epochs)} epochs")
    return [[ids for step in epoch for batch in step.micro for ids in batch.ids] for epoch in dealt.epochs]


class Lesson(Rows):
    """A few rows to be learned by heart."""


def _lesson(random: Random) -> Lesson:
    words = random.sample(_WORDS, 4)
    pairs = zip(words[:2], words[2:], strict=True)
    return Lesson(rows=tuple(Pair(prompt=f"The word for {one}?", completion=other) for one, other in pairs))


LEARNING = {
    **PLAIN,
    "template.name": "tokenizer",
    "adapter.rank": 8,
    "adapter.alpha": 16.0,
    "training.epochs": 120.0,
    "training.batch_size": 2,
    "training.learning_rate": 0.001,
    "training.schedule": "constant",
    "training.warmup_fraction": 0.0,
    "evaluation.max_new_tokens": 12,
}


@law(
    "learning.by-heart",
    "What was trained on again and again is answered, word for word, and then the model stops.",
    needs=["tokenize", "train", "generate"],
    oracle="the answers that were trained on; the shipped model knows none of them",
    cases=Chance(_lesson, sound=0.9, broken=0.4, most=30),
    tier=2,
    cost=30,
)
def what_was_learned_is_answered(trainer: Trainer, case: Lesson) -> None:
    """Greedy answers to the prompts, as they were tokenized for training, are the trained tokens."""
    model: Any = locate_model(SMALL_MODEL).folder
    given = {"model": model, "settings": LEARNING}
    rows = trainer.ask("tokenize", TokenRows, rows=case.values, **given).rows
    course = trainer.ask("train", TrainingResult, rows=case.values, folder=trainer.folder() / "run", **given)
    prompts = [row.ids[: row.targets.index(True)] for row in rows]
    said = trainer.ask("generate", Generated, prompts=prompts, adapter=course.adapter, **given).answers
    for row, answer in zip(rows, said, strict=True):
        taught = [token for token, target in zip(row.ids, row.targets, strict=True) if target]
        # What ends an answer is taught, and left out of what is said.
        begun = answer and taught[: len(answer)] == answer
        check(begun and len(taught) - len(answer) in (1, 2), expected=taught, got=answer)
