"""The training loop, the only one: it drives a session, yields events, and knows no framework."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from finetune.errors import NonFiniteError
from finetune.events import Event, FirstGradients, HeldOutLoss, StepDone
from finetune.objectives import measured_in
from finetune.objectives.cross_entropy import CROSS_ENTROPY
from finetune.ports import Objective, Session
from finetune.processes import resident_memory
from finetune.records import Batch, TokenizedRow
from finetune.training.schedule import Schedule, learning_rate_at

Batching = Callable[[int], Sequence[Batch]]


@dataclass(frozen=True, slots=True)
class LoopPlan:
    """Everything the loop needs to know, decided beforehand.

    `last_step` ends training before `total_steps`, over which the learning rate is laid out all the same. Steps that
    have `rates` of their own take those.
    """

    total_steps: int
    gradient_accumulation_steps: int
    learning_rate: float
    warmup_steps: int
    schedule: Schedule
    evaluate_every: int
    last_step: int | None = None
    rates: Mapping[int, float] = field(default_factory=dict)
    objective: Objective = CROSS_ENTROPY

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        if step in self.rates:
            return self.rates[step]
        pace, warmup = self.learning_rate, self.warmup_steps
        return learning_rate_at(step, self.total_steps, learning_rate=pace, warmup_steps=warmup, schedule=self.schedule)

    @property
    def end(self) -> int:
        """The last step that is taken."""
        return self.total_steps if self.last_step is None else self.last_step


def steps_per_epoch(row_count: int, batch_size: int, gradient_accumulation_steps: int) -> int:
    """How many optimizer steps an epoch takes; the last one may hold fewer rows."""
    return math.ceil(math.ceil(row_count / batch_size) / gradient_accumulation_steps)


def train(
    session: Session, batches_of: Batching, held_out: Sequence[Batch], plan: LoopPlan, *, done_steps: int = 0
) -> Iterator[Event]:
    """Train until `plan.end` optimizer steps are done, and tell each step as it is done.

    `batches_of(epoch)` must give the same batches each time it is asked, so that a run continued after `done_steps`
    steps sees what an uninterrupted one would have seen. The loss of a step is divided by its objective's units, tokens
    for example, over all batches that it accumulates; the batches left over at the end of an epoch make a step of
    their own. `StepDone` is the last event of its step.

    Raises:
        NonFiniteError: a loss or gradient norm is NaN or infinite; no weight is changed by that step.
    """
    step = 0
    epoch = 0
    while step < plan.end:
        batches = batches_of(epoch)
        windows = [
            batches[start : start + plan.gradient_accumulation_steps]
            for start in range(0, len(batches), plan.gradient_accumulation_steps)
        ]
        for index, window in enumerate(windows):
            if step == plan.end:
                return
            step += 1
            if step <= done_steps:
                continue
            due = held_out and (step % plan.evaluate_every == 0 or step == plan.end)
            for event in training_step(session, window, plan, step, epoch + (index + 1) / len(windows)):
                # Before `StepDone`, when listeners save: what came after it would be missing from a resumed run.
                if due and isinstance(event, StepDone):
                    yield HeldOutLoss(step, *mean_loss(session, held_out, measured_in(plan.objective)))
                yield event
        epoch += 1


def training_step(
    session: Session, window: Sequence[Batch], plan: LoopPlan, step: int, epoch: float
) -> Iterator[Event]:
    """One optimizer step over the batches of a window, and what it tells."""
    started = time.perf_counter()
    units = sum(plan.objective.units(batch) for batch in window)
    total = 0.0
    for batch in window:
        total += session.accumulate(batch, 1 / units, plan.objective)
    loss = total / units
    if not math.isfinite(loss):
        raise _non_finite("loss", loss, step, window)
    norms = session.gradient_norms() if step == 1 else {}
    rate = plan.rate_at(step)
    norm = session.clip_gradients()
    if not math.isfinite(norm):
        raise _non_finite("gradient norm", norm, step, window)
    if step == 1:
        yield FirstGradients(norms)
    session.update(rate)
    yield StepDone(
        step=step,
        total_steps=plan.end,
        epoch=epoch,
        loss=loss,
        learning_rate=rate,
        grad_norm=norm,
        tokens=sum(batch.token_count for batch in window),
        trained_tokens=sum(batch.target_count for batch in window),
        seconds=time.perf_counter() - started,
        rss=resident_memory(),
    )


def mean_loss(session: Session, batches: Sequence[Batch], objective: Objective = CROSS_ENTROPY) -> tuple[float, int]:
    """The loss per unit over all batches, dropout off, and the number of units: trained tokens, or the objective's.

    Raises:
        NonFiniteError: the loss of a batch is NaN or infinite.
    """
    units = sum(objective.units(batch) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = session.loss(batch, objective)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss, without training, is {loss} (rows {_places([batch])})",
                hint="lower training.learning_rate, or look for broken weights, or for broken rows at those places",
            )
        total += loss
    return total / units, units


def _non_finite(what: str, value: float, step: int, window: Sequence[Batch]) -> NonFiniteError:
    return NonFiniteError(
        f"the {what} became {value} at step {step} (rows {_places(window)}); the weights are those of step {step - 1}",
        hint="lower training.learning_rate, or look for broken rows at those places",
    )


def _places(window: Sequence[Batch]) -> str:
    rows: list[TokenizedRow] = [row for batch in window for row in batch.rows]
    return ", ".join(row.where for row in rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
