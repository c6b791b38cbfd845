"""Laws of the learning rate: what is told of it is the schedule, over optimizer steps."""

import math
from typing import Annotated

from hypothesis import strategies as st
from pydantic import Field

from finetune.verify.suite.cases import TINY, Rows, rows_of
from finetune.verify.suite.catalogue import law
from finetune.verify.suite.learned import QUICK, train
from finetune.verify.suite.trainer import Trainer
from finetune.verify.suite.verdicts import check

_PEAK = 3e-4


class Scheduled(Rows):
    """A run: so many steps an epoch, each of so many batches; a tenth of the steps is one."""

    accumulation: Annotated[int, Field(ge=1, le=4)]
    epochs: Annotated[int, Field(ge=1, le=10)]
    warmup: Annotated[int, Field(ge=0, le=5)]
    schedule: Annotated[str, Field(pattern="^(constant|linear|cosine)$")]

    @property
    def steps(self) -> int:
        """How many optimizer steps there are."""
        return self.epochs * math.ceil(len(self.rows) / self.accumulation)


def _rate(case: Scheduled, step: float, total: int) -> float:
    """The rate at a step, from 0; warm-up ends at the peak and the rest ends near zero."""
    if step <= case.warmup:
        return _PEAK * max(step, 0.0) / case.warmup if case.warmup else _PEAK
    done = min(1.0, (step - case.warmup) / (total - case.warmup))
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return _PEAK * shapes[case.schedule]


@law(
    "schedule.closed_form",
    "The learning rate follows its schedule over optimizer steps: it warms up, and it comes down by the last one.",
    needs=["train"],
    oracle="the schedule's formula at the step and at its neighbours: trainers count from 0 or from 1",
    cases=st.builds(
        Scheduled,
        rows=rows_of(3, 3),
        accumulation=st.sampled_from([3, 2]),
        epochs=st.just(5),
        warmup=st.sampled_from([2, 0]),
        schedule=st.sampled_from(["linear", "cosine", "constant"]),
    ),
    examples=5,
    cost=4,
)
def rate_follows_its_schedule(trainer: Trainer, case: Scheduled) -> None:
    """Every rate that is told lies between those of the steps next to it, and there are as many steps as there are."""
    settings = {
        **QUICK,
        "training.batch_size": 1,
        "training.accumulation": case.accumulation,
        "training.epochs": float(case.epochs),
        "training.learning_rate": _PEAK,
        "training.schedule": case.schedule,
        "training.warmup_fraction": case.warmup / case.steps,
    }
    told = train(trainer, trainer.model(TINY), settings, case.values).steps
    check([step.step for step in told] == [*range(1, case.steps + 1)], expected=f"{case.steps} steps", got=len(told))
    for step in told:
        if step.learning_rate is None:
            continue
        near = [_rate(case, step.step + shift, case.steps) for shift in (-1, 0, 1)]
        holds = min(near) * (1 - 1e-3) - 1e-12 <= step.learning_rate <= max(near) * (1 + 1e-3)
        check(holds, expected=f"step {step.step}: {near[0]:.6g} to {near[-1]:.6g}", got=f"{step.learning_rate:.6g}")
