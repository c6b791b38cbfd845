"""Resumes a run from its newest checkpoint, and refuses one that is not as it was."""

import os

from finetune.distributed.data_parallel import check_same
from finetune.distributed.environment import launch_words
from finetune.errors import FineTuneError, InterruptedRunError, LostProcessError, RefusedError, StorageError
from finetune.events import HeldOutLoss
from finetune.ports import Session
from finetune.run.checkpoints import CheckpointStore, Owner
from finetune.run.folder import RunFolder
from finetune.training.early_stopping import EarlyStopping
from finetune.training.longer import check_longer, lengthening
from finetune.training.run import Run


def claim_resumed(run: Run, owner: Owner) -> None:
    """Claim a run to resume, and refuse, before anything is done, one that is not as it was.

    A run without a checkpoint may have changed.

    Raises:
        OutputError: another process is at work in it, or has finished it.
        RefusedError: a checkpoint is damaged, missing, or belongs to other settings, or events are missing.
        FineTuneError: it is to be made longer, and cannot be: see `check_longer`.
    """
    run.folder.claim()
    # Again: another process may have finished it while this one got ready.
    RunFolder.unfinished(run.folder.path, longer=run.planned is not None)
    store = run.checkpoints()
    done = store.newest()
    if run.planned is not None:
        run.lengthened = lengthening(run.folder, run.planned, run.prepared)
    if run.lengthened is not None:
        check_longer(run.folder, run.lengthened, early_stopping_at(run, done or 0))
    if done is None:
        return
    store.open(done, owner.identity)
    stopping = early_stopping_at(run, done)
    if run.prepared.plan.config.training.load_best_model and stopping.best_step:
        if stopping.best_step not in store.steps():
            raise RefusedError(
                f"the checkpoint of the best step so far, {stopping.best_step}, is gone from {store.folder}",
                hint="restore it, or start a new run with another --output",
            )
        store.open(stopping.best_step, owner.identity)


def load_newest(run: Run, session: Session, store: CheckpointStore, owner: Owner) -> int:
    """Load the newest checkpoint, in every process the same one; returns its step, 0 for a new run."""
    done = store.newest() or 0
    if done:
        session.load_state(store.open(done, owner.identity))
    same = {"the step to go on from": done, "the last step": run.prepared.total_steps}
    check_same(run.group, {**owner.identity, **run.backend.versions(), **same})
    return done


def early_stopping_at(run: Run, done: int) -> EarlyStopping:
    """Early stopping as it was after step `done`, from the held-out losses that were logged up to there."""
    training = run.prepared.plan.config.training
    stopping = EarlyStopping(training.early_stopping_patience, training.early_stopping_min_delta)
    for event in run.folder.events_up_to(done):
        # The base's own loss, at step 0, is no step of the training that could be stopped at or kept.
        if isinstance(event, HeldOutLoss) and event.step > 0:
            stopping = stopping.update(event.step, event.loss)
    return stopping


def interrupted(run: Run, error: BaseException) -> FineTuneError:
    """What ended a run before its time, with what is kept of it and the line that goes on."""
    kept, hint = run.folder.resume_hint(launch=launch_words(os.environ, run.group.size))
    if isinstance(error, (LostProcessError, StorageError)):
        first = error.hint if isinstance(error, StorageError) else ""  # a full disk needs room before it can go on
        return type(error)(f"{error.message}; {kept}", hint="; ".join(filter(None, (first, hint))))
    return InterruptedRunError(f"interrupted; {kept}", hint=hint)
