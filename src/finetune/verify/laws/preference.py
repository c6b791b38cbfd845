"""Laws of preferences: what a run on pairs begins from, and where it goes."""

import math
from typing import Any

from finetune.verify.catalogue import law, oracle
from finetune.verify.check import check
from finetune.verify.client import SubjectClient
from finetune.verify.laws.helpers import adapter_of, same_course, train
from finetune.verify.subjects.answers import TrainingResult, Weights
from finetune_strategies.cases import preference as cases


@law("dpo.oracle", ["train_pairs", "initial_adapter", "adapter_weights"], cases.DPO_ORACLE, examples=6, cost=4)
@oracle("the same run in float64, from the adapter that the trainer begins with: loss and gradient by their formula")
def pairs_move_as_they_should(trainer: SubjectClient, case: cases.Choices) -> None:
    """A run on pairs moves the adapter as sigmoid DPO says: sums of log p, their reference and beta together."""
    given: dict[str, Any] = {"model": trainer.model(case.model), "settings": case.settings}
    start = trainer.ask("initial_adapter", Weights, **given)
    course = _learn(trainer, case, **given)
    wanted = _learn(trainer, case, of="oracle", start=start.file, **given)
    same_course(trainer, given["model"], start.file, course, wanted)


@law("dpo.reference", ["train", "train_pairs"], cases.DPO_REFERENCE, examples=4, cost=4)
@oracle("no pair has gained anything before the first step, whose loss is therefore ln 2")
def reference_is_the_start(trainer: SubjectClient, case: cases.Choices) -> None:
    """Preferences are measured from the model as it stands at step 0, also where an adapter goes on."""
    given: dict[str, Any] = {"model": trainer.model(case.model), "settings": case.settings}
    first = adapter_of(train(trainer, rows=case.answers, **given))
    for adapter in (None, first):
        told = _learn(trainer, case, adapter=adapter, **given).steps[0].loss
        near = told is None or abs(told - math.log(2)) <= 1e-3
        how = "from an adapter" if adapter else "from its base"
        check(near, expected=f"{math.log(2):.6f} at the first step {how}", got=told)


def _learn(trainer: SubjectClient, case: cases.Choices, of: str = "trainer", **given: Any) -> TrainingResult:
    """A run on the pairs, in a folder of its own."""
    asked = trainer.oracle if of == "oracle" else trainer
    more = {name: value for name, value in given.items() if value is not None}
    return asked.ask("train_pairs", TrainingResult, rows=case.values, folder=trainer.folder() / "run", **more)
