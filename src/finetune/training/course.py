"""Trains a run's session to its end: from the newest checkpoint, until it is time to stop, to the weights to keep."""

from collections.abc import Iterator
from dataclasses import dataclass

from finetune.data.batches import epoch_batches
from finetune.distributed.data_parallel import check_same, in_team
from finetune.errors import RefusedError
from finetune.events import (
    CheckpointSaved,
    Event,
    FixedLoss,
    HeldOutLoss,
    RunResumed,
    StepDone,
    StoppedEarly,
)
from finetune.evidence.observe import Observation, held_out_batches
from finetune.ports import Session
from finetune.records import Batch, Tokenized
from finetune.run.checkpoints import CheckpointStore, Owner
from finetune.run.folder import RunFolder
from finetune.training.early_stopping import Watch
from finetune.training.loop import LoopPlan, train
from finetune.training.packing_check import check_packing
from finetune.training.prepare import batch_of_all, pack_length, packed_sample
from finetune.training.run import Run


@dataclass(frozen=True, slots=True)
class Trained:
    """How training went: the steps that were planned and taken, the step whose weights are kept, and the best one."""

    planned: int
    taken: int
    kept: int
    watch: Watch

    @property
    def stopped_early(self) -> bool:
        """Whether the held-out loss ended training before its last step."""
        return self.taken < self.planned


def steps_of(
    run: Run, session: Session, rows: tuple[Tokenized, ...], *, done: int = 0, last: int | None = None
) -> Iterator[Event]:
    """Train the session on the rows as the run's plan says, after step `done` and up to step `last`.

    The batches are those of one process whose batch size is that of all processes together, so that so many
    processes learn from every batch what it would: each takes its share of it. When the last event is told, what the
    processes hold of the model's weights may still be divided among them; `run.group.restore` undoes that.
    """
    training = run.prepared.plan.config.training
    assert training.evaluate_every is not None
    plan = LoopPlan(
        total_steps=run.prepared.total_steps,
        accumulation=training.accumulation,
        peak_learning_rate=training.learning_rate,
        warmup_steps=round(training.warmup_fraction * run.prepared.total_steps),
        schedule=training.schedule,
        evaluate_every=training.evaluate_every,
        last_step=last,
    )
    size, length = batch_of_all(run.prepared.plan), pack_length(run.prepared.plan)

    def batches_of(epoch: int) -> list[Batch]:
        return epoch_batches(rows, size, seed=training.seed, epoch=epoch, pack_length=length)

    team = in_team(session, run.group, shares=training.processes or 1, seed=training.seed, done_steps=done)
    run.group.divide(session)
    return train(team, batches_of, held_out_batches(run.prepared), plan, done_steps=done)


def claim_resumed(run: Run, owner: Owner) -> None:
    """Take hold of a run to go on with, and refuse, before anything is done, one that is not as it was.

    A run without a checkpoint may have changed.

    Raises:
        OutputError: another process is at work in it, or has finished it.
        RefusedError: a checkpoint is damaged, missing, or belongs to other settings, or events are missing.
    """
    run.folder.claim()
    RunFolder.unfinished(run.folder.path)  # again: another process may have finished it while this one got ready
    store = CheckpointStore(run.folder.checkpoints)
    done = store.newest()
    if done is None:
        return
    store.open(done, owner.identity)
    watch = _watch(run, done)
    if run.prepared.plan.config.training.keep == "best" and watch.best_step:
        if watch.best_step not in store.steps():
            raise RefusedError(
                f"the checkpoint of the best step so far, {watch.best_step}, is gone from {store.folder}",
                hint="restore it, or start a new run with another --output",
            )
        store.open(watch.best_step, owner.identity)


def train_run(run: Run, session: Session, before: Observation, owner: Owner) -> Trained:
    """Train from the newest checkpoint to the end; the session then has the weights that the run keeps.

    Raises:
        RefusedError: as `claim_resumed`.
    """
    store = CheckpointStore(run.folder.checkpoints)
    done = _restore(run, session, store, owner)
    if run.prepared.plan.config.training.packing:
        with run.phase("check packing", "rows that share a sequence must not see each other"):
            check_packing(session, packed_sample(run.prepared), run.prepared.plan.config.model.dtype)
    run.folder.rewind_events(done)
    if done:
        run.tell(RunResumed(done, tuple(store.changes(done, owner.told))))
    else:
        run.tell(FixedLoss(0, *before.fixed))
        if before.held_out:
            run.tell(HeldOutLoss(0, *before.held_out))
    crowd = f", in {run.group.size} processes" if run.group.size > 1 else ""
    with run.phase("train", f"{run.prepared.total_steps} steps, from step {done}{crowd}"):
        taken, watch = _go_on(run, session, store, owner)
    run.group.restore(session)
    best = watch.best_step if run.prepared.plan.config.training.keep == "best" else 0
    kept = round(run.group.total(best or taken))
    if kept != taken:
        with run.phase("take the best step", f"step {kept}, held-out loss {watch.best_loss:.4f}"):
            session.load_state(store.open(kept, owner.identity))
    store.release()
    return Trained(run.prepared.total_steps, taken, kept, watch)


def train_along(run: Run, session: Session, owner: Owner) -> int:
    """Train as all processes but the first do, who decides when to stop; returns the step that the first one keeps."""
    done = _restore(run, session, CheckpointStore(run.folder.checkpoints), owner)
    if not _anybody_stops(run, stops=False):
        for event in steps_of(run, session, run.prepared.training_rows, done=done):
            if isinstance(event, HeldOutLoss) and _anybody_stops(run, stops=False):
                break
    run.group.restore(session)
    return round(run.group.total(0))


def _restore(run: Run, session: Session, store: CheckpointStore, owner: Owner) -> int:
    """Go on from the newest checkpoint, every process from the same one; returns its step, 0 for a new run."""
    done = store.newest() or 0
    if done:
        session.load_state(store.open(done, owner.identity))
    check_same(run.group, {**owner.identity, **run.backend.versions(), "the step to go on from": done})
    return done


def _anybody_stops(run: Run, *, stops: bool) -> bool:
    """Whether training ends here: the first process says so and the others ask."""
    return run.group.total(stops) > 0


def _go_on(run: Run, session: Session, store: CheckpointStore, owner: Owner) -> tuple[int, Watch]:
    """Train, tell and keep checkpoints until the steps are done or the watch stops; the last step, and the watch."""
    training, total = run.prepared.plan.config.training, run.prepared.total_steps
    step = store.newest() or 0
    watch = _watch(run, step)
    if _anybody_stops(run, stops=watch.stops):
        return step, watch
    for event in steps_of(run, session, run.prepared.training_rows, done=step):
        run.tell(event)
        if isinstance(event, HeldOutLoss):
            watch = watch.look(event.step, event.loss)
            _anybody_stops(run, stops=watch.stops)
            # Before `StepDone`, for what is told after a checkpoint would be missing from a resumed run.
            if watch.stops and event.step < total:
                run.tell(StoppedEarly(event.step, total, watch.idle, watch.best_step, watch.best_loss))
        if not isinstance(event, StepDone):
            continue
        step = event.step
        best = training.keep == "best" and watch.best_step == step
        if step % (training.save_every or 1) == 0 or step == total or watch.stops or best:
            run.folder.secure_events()
            kept = (watch.best_step or None) if training.keep == "best" else None
            path = store.save(step, session.save_state, owner, best=kept)
            run.tell(CheckpointSaved(step, path.relative_to(run.folder.path).as_posix()))
        if watch.stops:
            break
    return step, watch


def _watch(run: Run, done: int) -> Watch:
    """The watch as it was after step `done`: what the logged looks up to there say."""
    training = run.prepared.plan.config.training
    watch = Watch(training.stop_after, training.stop_margin)
    for event in run.folder.events_up_to(done):
        # The base's own loss, at step 0, is no step of the training that could be stopped at or kept.
        if event["event"] == HeldOutLoss.__name__ and event["step"] > 0:
            watch = watch.look(event["step"], event["loss"])
    return watch


def say_ending(trained: Trained, keep: str) -> list[str]:
    """Why training ended where it did, and whose weights were kept, for people; nothing where nothing is unusual."""
    notes = []
    watch = trained.watch
    if trained.stopped_early:
        notes.append(
            f"training stopped early, at step {trained.taken} of {trained.planned}: the held-out loss had not improved "
            f"for {watch.idle} looks in a row; it was lowest, {watch.best_loss:.4f}, at step {watch.best_step}; the "
            "learning rate went as planned for all steps"
        )
    if keep == "best":
        notes.append(
            f"the adapter is that of step {trained.kept}, which had the lowest held-out loss; a loss that the step was "
            "chosen by flatters it"
        )
    return notes
