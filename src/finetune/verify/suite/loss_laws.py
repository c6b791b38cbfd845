"""Laws of losses and gradients: what is reported, and what moves the weights, is what the arithmetic says."""

import math
from typing import Annotated, Any

import numpy as np
from hypothesis import strategies as st
from pydantic import Field

from finetune.verify.doors.answers import Gradient, Loss, TrainingResult, Weights
from finetune.verify.doors.door import UnsupportedError
from finetune.verify.recipes import ModelRecipe, Recipe
from finetune.verify.suite.cases import PAIRS, PLAIN, TINY, Pair, Rows, TokenRowCase, one_of, rows_of, token_rows
from finetune.verify.suite.catalogue import law
from finetune.verify.suite.learned import (
    KINDS,
    MODELS,
    ONE_ROW,
    QUICK,
    Learned,
    adapter_of,
    refused,
    train,
    weights_of,
)
from finetune.verify.suite.talks import tokenized
from finetune.verify.suite.trainer import Trainer
from finetune.verify.suite.verdicts import check


class Batches(Recipe):
    """Batches of token rows that make one optimizer step, and the model."""

    micro: Annotated[tuple[tuple[TokenRowCase, ...], ...], Field(min_length=1, max_length=3, strict=False)]
    model: ModelRecipe = TINY

    @property
    def values(self) -> list[list[dict[str, Any]]]:
        """The batches as a question has them."""
        return [[row.value for row in batch] for batch in self.micro]


def _batches(least: int, most: int, largest: int) -> st.SearchStrategy[Batches]:
    batch = st.lists(token_rows(12), min_size=1, max_size=largest).map(tuple)
    return st.builds(Batches, micro=st.lists(batch, min_size=least, max_size=most).map(tuple), model=MODELS)


@law(
    "loss.oracle",
    "The loss of a batch is the mean surprise of its trained tokens, each counted once.",
    needs=["loss"],
    oracle="the same batch computed in float64 from the model's files",
    cases=_batches(1, 1, 3),
    examples=8,
)
def loss_is_surprise(trainer: Trainer, case: Batches) -> None:
    """The loss, and the number of tokens where it is told."""
    given = {"model": trainer.model(case.model), "settings": PLAIN, "batch": case.values[0]}
    found, wanted = trainer.ask("loss", Loss, **given), trainer.oracle.ask("loss", Loss, **given)
    near = abs(found.loss - wanted.loss) <= 1e-3 * (1 + wanted.loss)
    check(near, expected=f"loss {wanted.loss:.6f}", got=f"loss {found.loss:.6f}")
    check(found.count in (None, wanted.count), expected=f"{wanted.count} tokens", got=f"{found.count} tokens")


class FirstStepCase(Recipe):
    """A token row to take the first step on, with an adapter of a kind."""

    row: TokenRowCase
    kind: Annotated[str, Field(pattern=one_of(KINDS))]


@law(
    "gradient.first",
    "In the first step an adapter of any kind leaves the model as it is, and its B alone has a gradient.",
    needs=["gradient"],
    oracle="B is zero at first, so that the loss is the base's, nothing reaches A, and B's gradient is not zero",
    cases=st.builds(
        FirstStepCase, row=st.just(TokenRowCase(ids=(20, 30, 40, 50, 60), answer=2)), kind=st.sampled_from(list(KINDS))
    ),
    examples=5,
)
def first_gradient_is_of_b(trainer: Trainer, case: FirstStepCase) -> None:
    """The loss of the base, zero for every A, more than zero for every B, and no layer is left out."""
    given = {"model": trainer.model(TINY), "settings": {**PLAIN, **KINDS[case.kind]}, "micro": [[case.row.value]]}
    found, wanted = (each.ask("gradient", Gradient, **given) for each in (trainer, trainer.oracle))
    # By the trainer's own loss, where it tells one: whether that is right is another law.
    teller = trainer.oracle if trainer.lacks("loss") else trainer
    base = teller.ask("loss", Loss, model=given["model"], settings=PLAIN, batch=[case.row.value])
    near = abs(found.loss - base.loss) <= 1e-3 * (1 + base.loss)
    check(near, expected=f"the base's loss, {base.loss:.6f}", got=f"{found.loss:.6f}")
    lacking = sorted(wanted.norms.keys() - found.norms.keys())
    check(not lacking, expected=f"a gradient of {lacking[:1]}", got=f"{len(found.norms)} others")
    for name, norm in wanted.norms.items():
        if ".lora_A." in name:
            check(found.norms[name] == 0, expected=f"{name}: 0", got=f"{name}: {found.norms[name]}")
        if ".lora_B." in name and norm > 1e-6:
            check(found.norms[name] > 0, expected=f"{name}: about {norm:.4g}", got=f"{name}: {found.norms[name]}")


@law(
    "gradient.oracle",
    "A step's gradient is that of all its trained tokens together, and so is the loss that is reported for it.",
    needs=["gradient", "initial_adapter"],
    oracle="the same batches in float64, from the adapter that the trainer begins with",
    cases=_batches(1, 3, 2),
    examples=8,
    cost=2,
)
def gradient_is_of_all_tokens(trainer: Trainer, case: Batches) -> None:
    """The norm of each tensor's gradient, whatever the lengths of the batches that are added up."""
    given = {"model": trainer.model(case.model), "settings": PLAIN}
    start = trainer.ask("initial_adapter", Weights, **given).file
    found = trainer.ask("gradient", Gradient, micro=case.values, **given)
    wanted = trainer.oracle.ask("gradient", Gradient, micro=case.values, start=start, **given)
    largest = max(wanted.norms.values())
    for name, norm in wanted.norms.items():
        near = abs(found.norms.get(name, math.inf) - norm) <= 2e-3 * norm + 1e-5 * largest
        check(near, expected=f"{name}: {norm:.6g}", got=f"{name}: {found.norms.get(name)}")
    near = abs(found.loss - wanted.loss) <= 1e-3 * (1 + wanted.loss)
    check(near, expected=f"loss {wanted.loss:.6f}", got=f"loss {found.loss:.6f}")


class WholeBatchCase(Learned):
    """A short run over rows that one step can hold."""

    accumulation: Annotated[int, Field(ge=1, le=4)] = 1
    batch_size: Annotated[int, Field(ge=1, le=4)] = 4
    decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 1e6
    schedule: Annotated[str, Field(pattern="^(constant|linear|cosine)$")] = "constant"
    rate: Annotated[float, Field(gt=0)] = 0.05

    @property
    def settings(self) -> dict[str, Any]:
        """All of them; a step holds all rows, so that their order says nothing."""
        return {
            **super().settings,
            "training.accumulation": self.accumulation,
            "training.batch_size": self.batch_size,
            "training.weight_decay": self.decay,
            "training.max_grad_norm": self.clip,
            "training.schedule": self.schedule,
            "training.learning_rate": self.rate,
            "training.epochs": 3.0,
        }


def _one_step_holds_all(case: WholeBatchCase) -> bool:
    return case.accumulation * case.batch_size >= len(case.rows)


_COURSES = st.builds(
    WholeBatchCase,
    rows=rows_of(1, 3),
    model=MODELS,
    kind=st.sampled_from(["lora", "dora", "rank-stabilised"]),
    accumulation=st.sampled_from([3, 2, 4, 1]),
    batch_size=st.sampled_from([1, 2, 3]),
    decay=st.sampled_from([0.0, 0.9]),
    clip=st.sampled_from([1e6, 0.01]),
    schedule=st.sampled_from(["constant", "linear"]),
).filter(_one_step_holds_all)


@law(
    "train.oracle",
    "Training moves the adapter as its settings say: batches, accumulation, rate, decay and clipping together.",
    needs=["train", "tokenize", "initial_adapter", "adapter_weights"],
    oracle="the same run in float64, from the adapter that the trainer begins with, where rows are the same tokens",
    cases=_COURSES,
    examples=8,
    cost=4,
)
def training_moves_as_it_should(trainer: Trainer, case: WholeBatchCase) -> None:
    """Every tensor ends where it should, but for a fiftieth of the way that it went; the first loss is the base's."""
    given: dict[str, Any] = {"model": trainer.model(case.model), "settings": case.settings}
    model = trainer.model(case.model)
    mine, theirs = (tokenized(each, model, case.values, case.settings).rows for each in (trainer.oracle, trainer))
    if [(row.ids, row.targets) for row in mine] != [(row.ids, row.targets) for row in theirs]:
        raise UnsupportedError("it makes other tokens, or other targets, of these rows than the oracle")
    start = trainer.ask("initial_adapter", Weights, **given)
    course = train(trainer, rows=case.values, **given)
    wanted = trainer.oracle.ask("train_from", TrainingResult, rows=case.values, file=start.file, **given)
    count = len(wanted.steps)
    check(len(course.steps) == count, expected=f"{count} steps", got=f"{len(course.steps)} steps")
    for told, right in zip(course.steps, wanted.steps, strict=True):
        near = told.loss is None or abs(told.loss - (right.loss or 0.0)) <= 5e-3 * (1 + (right.loss or 0.0))
        check(near, expected=f"loss {right.loss} at step {told.step}", got=told.loss)
    _, found = weights_of(trainer, given["model"], adapter_of(course))
    _, ends = weights_of(trainer.oracle, given["model"], adapter_of(wanted))
    begins = trainer.tensors(start.file)
    for name, end in ends.items():
        check(name in found, expected=name, got=sorted(found))
        way = float(np.abs(end - begins[name]).mean())
        off = float(np.abs(found[name] - end).mean())
        check(off <= way / 50 + 1e-8, expected=f"{name} moved by {way:.4g}", got=f"it ends {off:.4g} from there")


@law(
    "train.tail",
    "The batches that are left over at the end of an epoch make a step like any other, weighed by their own tokens.",
    needs=["train", "initial_adapter", "adapter_weights"],
    oracle="the same run in float64; all rows are alike, so that their order says nothing",
    cases=st.builds(
        WholeBatchCase,
        rows=st.sampled_from([3, 1]).map(lambda count: (Pair(prompt="ab", completion="cde"),) * count),
        accumulation=st.just(2),
        batch_size=st.just(1),
        rate=st.sampled_from([0.05, 1e-5]),
    ),
    examples=4,
    cost=4,
)
def tail_is_a_step(trainer: Trainer, case: WholeBatchCase) -> None:
    """One row a batch and two batches a step, of one row or three; the steps are large, or below what float16 sees."""
    training_moves_as_it_should(trainer, case)


@law(
    "loss.nan_told",
    "A loss that is no number is told, or ends the run: it is never hidden behind another.",
    needs=["train"],
    oracle="weights of more than 1e300 times another overflow, whatever the number format",
    cases=st.builds(Rows, rows=rows_of(1, 1)),
    examples=2,
    cost=2,
)
def nan_is_told(trainer: Trainer, case: Rows) -> None:
    """With a learning rate of 1e200 the second step's loss cannot be a number."""
    settings = {**QUICK, "training.learning_rate": 1e200, "training.epochs": 4.0}
    course = refused(lambda: train(trainer, trainer.model(TINY), settings, case.values))
    if course is not None:
        told = [step.loss for step in course.steps if step.loss is not None]
        check(not all(map(math.isfinite, told)), expected="a refusal, or a loss that is no number", got=told)


class DropoutCase(Recipe):
    """A row that dropout is tried on."""

    row: TokenRowCase


@law(
    "dropout.fresh",
    "Dropout is drawn anew for every batch.",
    needs=["gradient"],
    oracle="the mean of two different draws is not the first of them; of two equal ones it is",
    cases=st.builds(DropoutCase, row=token_rows(12)),
    examples=2,
)
def dropout_is_drawn_anew(trainer: Trainer, case: DropoutCase) -> None:
    """A step of one batch, and one of the same batch twice, have different gradients."""
    given = {"model": trainer.model(TINY), "settings": {**PLAIN, "adapter.dropout": 0.5}}
    once = trainer.ask("gradient", Gradient, micro=[[case.row.value]], **given).norms
    twice = trainer.ask("gradient", Gradient, micro=[[case.row.value]] * 2, **given).norms
    moved = [name for name, norm in once.items() if abs(twice.get(name, 0.0) - norm) > 1e-6 * norm]
    check(moved, expected="two draws that differ", got="the gradients of one batch and of two are the same")


@law(
    "dropout.acts",
    "Dropout acts in training, also after losses were looked at, and not on the loss that is looked at.",
    needs=["train", "adapter_weights", "evaluate"],
    oracle="the same run without it ends elsewhere; what is asked with it answers as what is asked without it",
    cases=st.builds(Rows, rows=st.lists(PAIRS, min_size=2, max_size=2, unique=True).map(tuple)),
    examples=2,
    cost=3,
)
def dropout_acts_in_training_alone(trainer: Trainer, case: Rows) -> None:
    """Two runs, and two looks at one of them."""
    model = trainer.model(TINY)
    ends = {}
    for share in (0.0, 0.5):
        ends[share] = adapter_of(train(trainer, model, {**QUICK, "adapter.dropout": share}, case.values))
    (_, plain), (_, dropped) = (weights_of(trainer, model, ends[share]) for share in (0.0, 0.5))
    moved = any(not np.allclose(plain[name], dropped[name], rtol=1e-4, atol=1e-7) for name in plain)
    check(moved, expected="another adapter with dropout than without", got="the same one")
    looks = []
    # Two rows alike, together and apart: nothing but what is drawn at random can tell.
    for size in (1, 2):
        settings, rows = {**QUICK, "adapter.dropout": 0.5, "training.batch_size": size}, case.values[:1] * 2
        look = trainer.ask("evaluate", Loss, model=model, rows=rows, adapter=ends[0.5], settings=settings)
        looks.append(look.loss)
    check(max(looks) - min(looks) <= 1e-4, expected="one loss, however often it is looked at", got=looks)


class Seeds(Rows):
    """Rows and two seeds."""

    seed: Annotated[int, Field(ge=0)]
    other: Annotated[int, Field(ge=0)]


@law(
    "seed.decides",
    "The same seed makes the same adapter, from the beginning to the end; another seed another one; 0 is a seed.",
    needs=["train", "initial_adapter", "adapter_weights"],
    oracle="the run itself, once more",
    cases=st.builds(Seeds, rows=rows_of(1, 2), seed=st.sampled_from([0, 7]), other=st.sampled_from([1, 3])),
    examples=3,
    cost=3,
)
def seed_decides(trainer: Trainer, case: Seeds) -> None:
    """Two beginnings and two ends of one seed, and a beginning of another."""
    model = trainer.model(TINY)

    def begin(seed: int) -> Any:
        given = {"model": model, "settings": {**QUICK, "training.seed": seed}}
        return trainer.tensors(trainer.ask("initial_adapter", Weights, **given).file)

    def end() -> Any:
        settings = {**QUICK, "training.seed": case.seed, "adapter.dropout": 0.3, "training.batch_size": 1}
        return weights_of(trainer, model, adapter_of(train(trainer, model, settings, case.values)))[1]

    for what, (once, again) in {"beginning": (begin(case.seed), begin(case.seed)), "end": (end(), end())}.items():
        same = once.keys() == again.keys() and all(np.array_equal(once[name], again[name]) for name in once)
        check(same, expected=f"one {what} with seed {case.seed}", got="two different ones")
    one, other = begin(case.seed), begin(case.other)
    alike = all(np.array_equal(one[name], other[name]) for name in one)
    check(not alike, expected=f"another beginning with seed {case.other}", got="the same one")


@law(
    "adapter.complete",
    "A finished adapter has every tensor of every layer that it was to be on, and of every module trained whole.",
    needs=["train", "adapter_weights"],
    oracle="names and shapes as PEFT's files have them",
    cases=st.builds(Learned, rows=ONE_ROW, kind=st.sampled_from(list(KINDS))),
    examples=5,
    cost=2,
)
def adapter_is_complete(trainer: Trainer, case: Learned) -> None:
    """The names and shapes of what was saved."""
    given: dict[str, Any] = {"model": trainer.model(case.model), "settings": case.settings}
    _, found = weights_of(trainer, given["model"], adapter_of(train(trainer, rows=case.values, **given)))
    wanted = trainer.oracle.tensors(trainer.oracle.ask("initial_adapter", Weights, **given).file)
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    for name, tensor in wanted.items():
        check(shapes.get(name) == list(tensor.shape), expected=f"{name} {list(tensor.shape)}", got=shapes.get(name))
