"""Laws of runs that go on: in the smallest case, which any trainer has that can go on at all."""

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from hypothesis import strategies as st
from pydantic import Field

from finetune.verify.doors.answers import TrainingResult, Weights
from finetune.verify.suite.cases import PLAIN, TINY, Rows, rows_of
from finetune.verify.suite.catalogue import law
from finetune.verify.suite.trainer import Tensors, Trainer
from finetune.verify.suite.verdicts import check

_STEPS, _STOP = 3, 1


class OnceStoppedCase(Rows):
    """Rows and a schedule of a run of three steps that is stopped after one."""

    schedule: Literal["constant", "linear", "cosine"]
    seed: Annotated[int, Field(ge=0)]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run."""
        return {
            **PLAIN,
            "training.batch_size": 1,
            "training.max_steps": _STEPS,
            "training.learning_rate": 0.01,
            "training.schedule": self.schedule,
            "training.seed": self.seed,
            "training.save_every": 1,
        }


@law(
    "resume.goes_on",
    "Training that is stopped and goes on ends where training ends that was never stopped.",
    needs=["train", "resume", "adapter_weights"],
    oracle="the trainer's own run of the same steps without a stop",
    cases=st.builds(
        OnceStoppedCase, rows=rows_of(1, 2), schedule=st.sampled_from(["constant", "linear"]), seed=st.integers(0, 2)
    ),
    tier=2,
    cost=8,
    examples=4,
)
def resumed_training_goes_on(trainer: Trainer, case: OnceStoppedCase) -> None:
    """The learning rates of the steps that remain, and the weights at the end, are those of the whole run."""
    model, folders = trainer.model(TINY), [trainer.folder() / "run" for _ in range(2)]
    given = {"model": model, "settings": case.settings, "rows": case.values}
    whole = trainer.ask("train", TrainingResult, folder=folders[0], **given)
    trainer.ask("train", TrainingResult, folder=folders[1], stop_after=_STOP, **given)
    rest = trainer.ask("resume", TrainingResult, folder=folders[1])
    rates = [_rates(whole)[_STOP:], _rates(rest)]
    check(rates[0] == rates[1], expected=f"learning rates {rates[0]}", got=f"learning rates {rates[1]}")
    right, found = (_weights(trainer, model, course) for course in (whole, rest))
    check(right.keys() == found.keys(), expected=sorted(right), got=sorted(found))
    away = {name: float(np.abs(right[name] - found[name]).max()) for name in right}
    worst = max(away, key=lambda name: away[name])
    check(away[worst] <= 1e-4, expected=f"the weights of the whole run in {worst}", got=f"{away[worst]:.5f} away")


def _rates(course: TrainingResult) -> list[float | None]:
    return [None if step.learning_rate is None else float(f"{step.learning_rate:.6g}") for step in course.steps]


def _weights(trainer: Trainer, model: Path, course: TrainingResult) -> Tensors:
    return trainer.tensors(trainer.ask("adapter_weights", Weights, model=model, adapter=course.adapter).file)
