"""Laws of losses, gradients and dropout: what is reported, and what moves the weights, is what the arithmetic says."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from finetune.adapters.kinds import layer_tensor
from finetune.verify.catalogue import law, oracle
from finetune.verify.check import check
from finetune.verify.client import SubjectClient
from finetune.verify.laws.helpers import adapter_of, refused, train, weights_of
from finetune.verify.subjects.answers import Gradient, Loss, Weights
from finetune.verify.subjects.subject import UnsupportedError
from finetune_strategies.cases import loss as cases
from finetune_strategies.cases.learned import QUICK, kind_settings
from finetune_strategies.cases.rows import PLAIN, TINY, Rows


@law("loss.oracle", ["loss"], cases.LOSS_ORACLE, examples=16)
@oracle("the same batch computed in float64 from the model's files")
def loss_is_surprise(trainer: SubjectClient, case: cases.Batches) -> None:
    """The loss of a batch is the mean surprise of its trained tokens, each counted once, foretold from those before."""
    given = {"model": trainer.model(case.model), "settings": PLAIN, "batch": case.values[0]}
    found, wanted = trainer.ask("loss", Loss, **given), trainer.oracle.ask("loss", Loss, **given)
    near = abs(found.loss - wanted.loss) <= 1e-3 * (1 + wanted.loss)
    check(near, expected=f"loss {wanted.loss:.6f}", got=f"loss {found.loss:.6f}")
    check(found.count in (None, wanted.count), expected=f"{wanted.count} tokens", got=f"{found.count} tokens")


@law("gradient.first", ["gradient"], cases.GRADIENT_FIRST, examples=5)
@oracle("B is zero at first, so that the loss is the base's, nothing reaches A, and B's gradient is not zero")
def first_gradient_is_of_b(trainer: SubjectClient, case: cases.FirstStep) -> None:
    """In the first step an adapter of any kind leaves the model as it is, and LoRA's B alone has a gradient."""
    given = {"model": trainer.model(TINY), "settings": kind_settings(case.kind, PLAIN), "micro": [[case.row.value]]}
    found, wanted = (each.ask("gradient", Gradient, **given) for each in (trainer, trainer.oracle))
    # By the trainer's own loss, where it tells one: whether that is right is another law.
    teller = trainer.oracle if trainer.lacks("loss") else trainer
    base = teller.ask("loss", Loss, model=given["model"], settings=PLAIN, batch=[case.row.value])
    near = abs(found.loss - base.loss) <= 1e-3 * (1 + base.loss)
    check(near, expected=f"the base's loss, {base.loss:.6f}", got=f"{found.loss:.6f}")
    lacking = sorted(wanted.norms.keys() - found.norms.keys())
    check(not lacking, expected=f"a gradient of {lacking[:1]}", got=f"{len(found.norms)} others")
    for name, norm in wanted.norms.items():
        known = layer_tensor(name)
        first = known.tensor.first_gradient if known else "any"
        if first == "zero":
            check(found.norms[name] == 0, expected=f"{name}: 0", got=f"{name}: {found.norms[name]}")
        if first == "some" and norm > 1e-6:
            check(found.norms[name] > 0, expected=f"{name}: about {norm:.4g}", got=f"{name}: {found.norms[name]}")


@law("gradient.oracle", ["gradient", "initial_adapter"], cases.GRADIENT_ORACLE, examples=8, cost=2)
@oracle("the same batches in float64, from the adapter that the trainer begins with")
def gradient_is_of_all_tokens(trainer: SubjectClient, case: cases.Batches) -> None:
    """A step's gradient is that of all its trained tokens together, and so is the loss that is reported for it."""
    _hold_gradient(trainer, case, PLAIN)


@law("gradient.smoothed", ["gradient", "initial_adapter"], cases.GRADIENT_SMOOTHED, examples=5, cost=2)
@oracle("the same batches in float64, from the adapter that the trainer begins with, smoothed by its formula")
def smoothed_gradient_is_of_all_tokens(trainer: SubjectClient, case: cases.Smoothed) -> None:
    """With label smoothing a step's gradient, and the loss that is reported for it, are of all its tokens, too."""
    _hold_gradient(trainer, case, {**PLAIN, "training.label_smoothing": case.smoothing})


def _hold_gradient(trainer: SubjectClient, case: cases.Batches, settings: Mapping[str, object]) -> None:
    """The gradient of a step, and its loss, are the oracle's."""
    given: dict[str, Any] = {"model": trainer.model(case.model), "settings": settings}
    start = trainer.ask("initial_adapter", Weights, model=given["model"], settings=PLAIN).file
    found = refused(lambda: trainer.ask("gradient", Gradient, micro=case.values, **given))
    if found is None:
        raise UnsupportedError("it refuses these settings")
    wanted = trainer.oracle.ask("gradient", Gradient, micro=case.values, start=start, **given)
    largest = max(wanted.norms.values())
    for name, norm in wanted.norms.items():
        near = abs(found.norms.get(name, math.inf) - norm) <= 2e-3 * norm + 1e-5 * largest
        check(near, expected=f"{name}: {norm:.6g}", got=f"{name}: {found.norms.get(name)}")
    near = abs(found.loss - wanted.loss) <= 1e-3 * (1 + wanted.loss)
    check(near, expected=f"loss {wanted.loss:.6f}", got=f"loss {found.loss:.6f}")


@law("gradient.recomputed", ["gradient"], cases.GRADIENT_RECOMPUTED, examples=6, tier=2, cost=2)
@oracle("the same step from the same seed without gradient checkpointing: the same products of the same numbers")
def recomputing_changes_no_gradient(trainer: SubjectClient, case: cases.Recomputed) -> None:
    """Gradient checkpointing changes no gradient: what is computed again is the same, what dropout drew included."""
    given = {"model": trainer.model(case.model), "micro": case.values}
    settings = {**PLAIN, "adapter.dropout": case.dropout}
    kept = trainer.ask("gradient", Gradient, settings=settings, **given)
    again = {**settings, "training.gradient_checkpointing": True}
    found = refused(lambda: trainer.ask("gradient", Gradient, settings=again, **given))
    if found is None:
        raise UnsupportedError("it refuses gradient checkpointing")
    largest = max(kept.norms.values())
    for name, norm in kept.norms.items():
        # A few roundings of float32, should its kernels add up in another order.
        near = abs(found.norms.get(name, math.inf) - norm) <= 1e-5 * norm + 1e-6 * largest
        check(near, expected=f"{name}: {norm:.6g}", got=f"{name}: {found.norms.get(name)}")
    check(abs(found.loss - kept.loss) <= 1e-5 * (1 + kept.loss), expected=f"loss {kept.loss}", got=found.loss)


@law("loss.nan_told", ["train"], cases.LOSS_NAN_TOLD, examples=2, cost=2)
@oracle("weights of more than 1e300 times another overflow, whatever the number format")
def nan_is_told(trainer: SubjectClient, case: Rows) -> None:
    """A loss that is no number is told, or ends the run: it is never hidden behind another."""
    settings = {**QUICK, "training.learning_rate": 1e200, "training.epochs": 4.0}
    course = refused(lambda: train(trainer, trainer.model(TINY), settings, case.values))
    if course is not None:
        losses = [step.loss for step in course.steps if step.loss is not None]
        check(not all(map(math.isfinite, losses)), expected="a refusal, or a loss that is no number", got=losses)


@law("dropout.fresh", ["gradient"], cases.DROPOUT_FRESH, examples=2)
@oracle("the mean of two different draws is not the first of them; of two equal ones it is")
def dropout_is_drawn_anew(trainer: SubjectClient, case: cases.DroppedRow) -> None:
    """Dropout is drawn anew for every batch."""
    given = {"model": trainer.model(TINY), "settings": {**PLAIN, "adapter.dropout": 0.5}}
    once = trainer.ask("gradient", Gradient, micro=[[case.row.value]], **given).norms
    twice = trainer.ask("gradient", Gradient, micro=[[case.row.value]] * 2, **given).norms
    moved = [name for name, norm in once.items() if abs(twice.get(name, 0.0) - norm) > 1e-6 * norm]
    check(moved, expected="two draws that differ", got="the gradients of one batch and of two are the same")


@law("dropout.spares_base", ["gradient"], cases.DROPOUT_SPARES, examples=4, cost=2)
@oracle("B is zero at first, so that what the adapter reads, dropped or not, adds nothing: the loss is the one without")
def dropout_is_the_adapters_alone(trainer: SubjectClient, case: cases.Spared) -> None:
    """Dropout takes from what the adapter reads, and not from what the base's layers do: it leaves the first loss."""
    settings = kind_settings(case.kind, {**PLAIN, "adapter.dropout": case.dropout})
    given = {"model": trainer.model(TINY), "micro": [[case.row.value]]}
    found = trainer.ask("gradient", Gradient, settings=settings, **given).loss
    wanted = trainer.ask("gradient", Gradient, settings=kind_settings(case.kind, PLAIN), **given).loss
    near = abs(found - wanted) <= 1e-3 * (1 + wanted)
    check(near, expected=f"the loss without dropout, {wanted:.6f}", got=f"{found:.6f}")


@law("dropout.acts", ["train", "adapter_weights", "evaluate"], cases.DROPOUT_ACTS, examples=2, cost=3)
@oracle("the same run without it ends elsewhere; what is asked with it answers as what is asked without it")
def dropout_acts_in_training_alone(trainer: SubjectClient, case: Rows) -> None:
    """Dropout acts in training, also after losses were looked at, and not on the loss that is looked at."""
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
