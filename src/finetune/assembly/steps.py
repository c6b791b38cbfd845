"""Starts the training loop on prepared rows: the plan's numbers, each epoch's batches, and who computes them."""

from collections.abc import Iterator, Sequence

from finetune.assembly.observe import held_out_batches
from finetune.assembly.prepare import Prepared, batch_of_all, pack_length
from finetune.events import Event
from finetune.ports import Group, Session
from finetune.records import Batch, Tokenized
from finetune.tokens.batch import epoch_batches
from finetune.training.loop import LoopPlan, train
from finetune.training.team import in_team


def training_steps(
    session: Session, prepared: Prepared, rows: Sequence[Tokenized], group: Group, *, done: int
) -> Iterator[Event]:
    """Train on `rows` as planned, together with the other processes of the group; tells what `train` tells.

    The batches are those of one process whose batch size is that of all processes together, so that so many
    processes learn from every batch what it would: each takes its share of it.
    """
    training = prepared.plan.config.training
    assert training.evaluate_every is not None
    plan = LoopPlan(
        total_steps=prepared.total_steps,
        accumulation=training.accumulation,
        peak_learning_rate=training.learning_rate,
        warmup_steps=round(training.warmup_fraction * prepared.total_steps),
        schedule=training.schedule,
        evaluate_every=training.evaluate_every,
    )
    size, length = batch_of_all(prepared.plan), pack_length(prepared.plan)

    def batches_of(epoch: int) -> list[Batch]:
        return epoch_batches(rows, size, seed=training.seed, epoch=epoch, pack_length=length)

    team = in_team(session, group, shares=training.processes or 1, seed=training.seed, done_steps=done)
    group.divide(session)
    yield from train(team, batches_of, held_out_batches(prepared), plan, done_steps=done)
    group.restore(session)
