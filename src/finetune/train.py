"""Fine-tune from a configuration to a report: the whole order, from top to bottom."""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from finetune.backends import open_backend
from finetune.config import LoadedConfig, dump_plan, resolve_processes
from finetune.criteria.judge import judge, overall
from finetune.data.batches import epoch_batches
from finetune.distributed.data_parallel import data_parallel
from finetune.errors import LostProcessError, ModelError, OutOfMemoryError, StorageError
from finetune.events import (
    CheckpointSaved,
    Event,
    FixedLoss,
    HeldOutLoss,
    PhaseStarted,
    RunJudged,
    RunResumed,
    RunStarted,
    StepDone,
    StoppedEarly,
)
from finetune.evidence.asked import Asked
from finetune.evidence.collect import collect_evidence
from finetune.evidence.extra_runs import Trainings, has_control, shuffled_label_rows
from finetune.evidence.forecast import forecast_run
from finetune.evidence.observe import (
    Observation,
    begin_at,
    compared_pairs,
    losses_at_start,
    observe,
    preference_evidence,
    what_is_compared,
)
from finetune.evidence.packing_check import check_packing
from finetune.evidence.record import run_owner, run_record
from finetune.evidence.saved import save_trained
from finetune.evidence.starting import with_start
from finetune.export.cached import made_from, with_model_folder
from finetune.files import describe_file, storage_errors, write_folder, write_json, write_text
from finetune.objectives import measured_in
from finetune.ports import Session
from finetune.records import Batch, TokenizedRow
from finetune.report import build_report, render_html
from finetune.report.card import CARD, licence_in, model_card
from finetune.run.checkpoints import CheckpointStore, Owner
from finetune.run.folder import RunFolder
from finetune.tracking.tracker import require_trackers
from finetune.training.early_stopping import EarlyStopping, Trained
from finetune.training.longer import Longer, lengthen
from finetune.training.loop import LoopPlan, train
from finetune.training.out_of_memory import with_estimate
from finetune.training.prepare import Prepared, batch_of_all, held_out_batches, pack_length, packed_sample, prepare
from finetune.training.resume import claim_resumed, early_stopping_at, interrupted, load_newest
from finetune.training.run import Listener, Run
from finetune.training.start import begun_note, start_of


def fine_tune(
    loaded: LoadedConfig,
    *,
    output: Path | None = None,
    resume: bool | Longer = False,
    command: str = "ft train",
    listener: Listener = lambda event: None,
) -> tuple[Path, dict[str, Any]]:
    """Fine-tune as configured, judge the result on measured evidence, and write the run folder.

    Of several processes that a launcher has started, the first does all this and the others train along.

    Args:
        loaded: where its model is a GGUF file, that is imported first, once a file.
        output: the run folder to make (or, with `resume`, to continue); by default one below `runs/`.
        resume: continue it as it was planned, or until it is as long as this says; it may be finished then.
        command: what to write down as the command that repeats the run.
        listener: receives every event.

    Returns:
        The run folder and the content of its `run.json`; a process that only trained along returns an empty record.

    Raises:
        FineTuneError: something was refused, failed, or was interrupted; see `finetune.errors`.
    """
    started = RunStarted(datetime.now(UTC).isoformat(timespec="seconds"), command, secrets.token_hex(8))
    clock = time.perf_counter()
    backend = open_backend(loaded.config.backend)
    require_trackers(loaded.config.tracking.to)
    group = backend.join()
    listener = (lambda event: None) if group.rank else listener
    loaded = loaded if resume else with_start(loaded)
    loaded = with_model_folder(loaded, tell=lambda words: listener(PhaseStarted("import", words)))
    listener(PhaseStarted("prepare", f"{loaded.config.model.path}"))
    prepared = prepare(resolve_processes(loaded, group.size, resume=bool(resume)))
    started = replace(started, made_from=made_from(prepared.location.folder))
    planned, prepared = (prepared, lengthen(prepared, resume)) if isinstance(resume, Longer) else (None, prepared)
    if not group.rank:
        _tell_beforehand(prepared, listener)
    if resume:
        folder = RunFolder.unfinished(output, longer=planned is not None)
    else:
        folder = RunFolder.place(None if group.rank else output)
    timing = {"prepare": time.perf_counter() - clock}
    run = Run(prepared, backend, group, folder, listener, timing, started=started, planned=planned)
    run.start = start_of(prepared.plan.config)
    if group.rank:
        _train_along(run)
        return folder.path, {}
    try:
        record = _train_and_judge(run, resume=bool(resume), clock=clock)
    except (KeyboardInterrupt, LostProcessError, StorageError) as error:
        raise interrupted(run, error) from None
    except (MemoryError, OutOfMemoryError) as error:
        raise with_estimate(error, prepared, run.folder.resume_hint()[0]) from None
    finally:
        run.let_go()
    return folder.path, record


def _tell_beforehand(prepared: Prepared, listener: Listener) -> None:
    """What nobody may miss of the rows, and what the run will be."""
    outlook = forecast_run(prepared)
    for phase, said in (("WARNING", outlook.warnings), ("note", prepared.notes), ("plan", [outlook.sentence()])):
        for words in said:
            listener(PhaseStarted(phase, words))


def _train_and_judge(run: Run, *, resume: bool, clock: float) -> dict[str, Any]:
    prepared = run.prepared
    owner = run_owner(prepared, run.backend.versions())
    if resume:
        claim_resumed(run, owner)
    with run.phase("load", f"{prepared.location.name}, {prepared.shape.parameters / 1e6:.2f} M parameters"):
        session = run.open_session()
        run.device = session.device
    with run.phase("observe base"):
        before = observe(session, prepared)
    with run.phase("attach"):
        run.attach_adapter(session)
    fingerprints = session.fingerprints()
    if run.start is not None:
        with run.phase("observe start", f"the adapter {run.start.name}, with a fresh optimizer"):
            run.beginning = begin_at(session, before)
        run.notes.append(begun_note(run.start, run.beginning, before.fixed[0]))
    with run.phase("reference", "log p of all answers, before the first step") if prepared.pairs else nullcontext():
        run.settle_objective(session)
        before = losses_at_start(session, before, measured_in(run.objective))
    # Only now, when nothing can be refused any more, is anything written.
    _begin(run, resume=resume)
    trained = train_to_the_end(run, session, before, owner)
    saved = run.folder.model if prepared.target is None else run.folder.adapter
    with run.phase(f"save {saved.name}"):
        write_folder(saved, lambda path: save_trained(prepared, session, path))
    with run.phase("observe tuned"):
        after = observe(session, prepared, before, measured_in(run.objective))
        preference = preference_evidence(session, before.asked, run.objective)
    run.tell(FixedLoss(trained.kept, *after.fixed))

    trainings = _trainings(run, session, owner, trained.kept, before.asked)
    evidence = collect_evidence(run, session, saved, (before, after, fingerprints), trainings, preference)
    verdicts = judge(evidence)
    run.tell(RunJudged(overall(verdicts), {verdict.id: verdict.outcome for verdict in verdicts}))
    run.close_trackers(complete=True)
    run.timing["total"] = time.perf_counter() - clock
    return _finish(run, run_record(run, trained, evidence, verdicts, before.asked))


def train_to_the_end(run: Run, session: Session, before: Observation, owner: Owner) -> Trained:
    """Train from the newest checkpoint to the end; the session then has the weights that the run keeps.

    Raises:
        RefusedError: a checkpoint is damaged or belongs to other settings, or packed rows see each other.
    """
    prepared, training = run.prepared, run.prepared.plan.config.training
    store = run.checkpoints(pinned=_control_checkpoint(prepared, before))
    if training.packing or prepared.pairs:
        # Before a checkpoint is loaded: the same is measured however often the run is resumed.
        with run.phase("check packing", "rows that share a sequence must not see each other"):
            if (packed := packed_sample(prepared)) is not None:
                sees = check_packing(session, packed, prepared.plan.config.model.dtype)
                run.notes.append(
                    f"rows that share a sequence were computed apart, too: {sees:.2g} of their loss would have shown"
                )
    done = load_newest(run, session, store, owner)
    run.folder.rewind_events(done)
    if done:
        run.tell(RunResumed(done, tuple(store.changes(done, owner.told))))
    else:
        run.tell(FixedLoss(0, *before.fixed))
        if before.held_out:
            run.tell(HeldOutLoss(0, *before.held_out))
    crowd = f", in {run.group.size} processes" if run.group.size > 1 else ""
    with run.phase("train", f"{prepared.total_steps} steps, from step {done}{crowd}"):
        taken, stopping = _train_and_checkpoint(run, session, store, owner)
    run.group.restore(session)
    best = stopping.best_step if training.load_best_model else 0
    kept = round(run.group.total(best or taken))
    if kept != taken:
        with run.phase("take the best step", f"step {kept}, held-out loss {stopping.best_loss:.4f}"):
            session.load_state(store.open(kept, owner.identity))
    store.release()
    return Trained(prepared.total_steps, taken, kept, stopping)


def _control_checkpoint(prepared: Prepared, before: Observation) -> int:
    """The step at which a control that the budget shortens ends: the model is kept as it is there, to compare with."""
    auto = prepared.plan.config.judge.control == "auto" and has_control(prepared)
    return before.asked.budget.control_steps if auto else 0


def _train_and_checkpoint(
    run: Run, session: Session, store: CheckpointStore, owner: Owner
) -> tuple[int, EarlyStopping]:
    """Train, log and save checkpoints until the steps are done or early stopping ends them.

    Returns:
        The last step that was taken, and what early stopping has seen.
    """
    training, total = run.prepared.plan.config.training, run.prepared.total_steps
    step = store.newest() or 0
    stopping = early_stopping_at(run, step)
    if _anybody_stops(run, stops=stopping.stops):
        return step, stopping
    for event in training_events(run, session, run.prepared.training_rows, done=step):
        run.tell(event)
        if isinstance(event, HeldOutLoss):
            stopping = stopping.update(event.step, event.loss)
            _anybody_stops(run, stops=stopping.stops)
            # Before `StepDone`: an event logged after a checkpoint would be missing from a resumed run.
            if stopping.stops and event.step < total:
                seen = (stopping.patience_used, stopping.best_step, stopping.best_loss)
                run.tell(StoppedEarly(event.step, total, *seen))
        if not isinstance(event, StepDone):
            continue
        step = event.step
        best = training.load_best_model and stopping.best_step == step
        due = step % (training.save_every or 1) == 0 or step in (total, store.pinned)
        if due or stopping.stops or best:
            run.folder.secure_events()
            kept = (stopping.best_step or None) if training.load_best_model else None
            path = store.save(step, session.save_state, owner, best=kept)
            run.tell(CheckpointSaved(step, path.relative_to(run.folder.path).as_posix()))
        if stopping.stops:
            break
    return step, stopping


def training_events(
    run: Run, session: Session, rows: Sequence[TokenizedRow], *, done: int = 0, last: int | None = None
) -> Iterator[Event]:
    """Train the session on the rows as the run's plan says, after step `done` and up to step `last`.

    Batches are those of one process whose batch size is that of all processes together; each process takes its share
    of every batch. After the last event the weights may still be divided among the processes: `run.group.restore`
    undoes that.
    """
    prepared, training = run.prepared, run.prepared.plan.config.training
    assert training.evaluate_every is not None
    assert training.learning_rate is not None
    plan = LoopPlan(
        total_steps=prepared.total_steps,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        warmup_steps=round(training.warmup_fraction * prepared.total_steps),
        schedule=training.schedule,
        evaluate_every=training.evaluate_every,
        last_step=last,
        # A control goes at the pace of the run, which may have been planned anew on its way.
        rates=run.folder.learning_rates() if last is not None else {},
        objective=run.objective,
    )
    size, length = batch_of_all(prepared.plan), pack_length(prepared.plan)

    def batches_of(epoch: int) -> Sequence[Batch]:
        return epoch_batches(rows, size, seed=training.seed, epoch=epoch, pack_length=length)

    parallel = data_parallel(session, run.group, shares=training.processes or 1, seed=training.seed, done_steps=done)
    run.group.divide(session)
    return train(parallel, batches_of, held_out_batches(prepared), plan, done_steps=done)


def _train_along(run: Run) -> None:
    """Train as every process but the first does: it writes, judges and logs nothing, and stops when the first says."""
    session = run.open_session()
    run.attach_adapter(session)
    run.settle_objective(session)
    owner = run_owner(run.prepared, run.backend.versions())
    done = load_newest(run, session, run.checkpoints(), owner)
    if not _anybody_stops(run, stops=False):
        for event in training_events(run, session, run.prepared.training_rows, done=done):
            if isinstance(event, HeldOutLoss) and _anybody_stops(run, stops=False):
                break
    run.group.restore(session)
    run.group.total(0)  # which step is kept
    if rows := shuffled_label_rows(run.prepared, {}):
        _train_control(run, rows, 0, None)


def _trainings(run: Run, session: Session, owner: Owner, kept: int, asked: Asked) -> Trainings[Any]:
    """What the shuffled-label control needs of this run."""
    store = run.checkpoints()

    def tuned(step: int) -> Any:
        with run.phase(f"observe step {step}", "to compare a shorter control with"):
            session.load_state(store.open(step, owner.identity))
            return what_is_compared(session, run.prepared, asked, run.objective)

    def control(rows: Sequence[TokenizedRow], steps: int) -> Any:
        return _train_control(run, rows, steps, asked)

    return Trainings(kept, store.steps(), control, tuned)


def _train_control(run: Run, rows: Sequence[TokenizedRow], steps: int, asked: Asked | None) -> Any:
    """What is compared of a fresh session after steps on other rows: those whose answers were shuffled.

    Args:
        steps: how many; the first process says it, for all of them. None are taken where it says 0.
        asked: None in a process that only trains along.
    """
    last = round(run.group.total(steps))
    if last == 0:
        return None
    others = "pairs changed round" if run.prepared.pairs else "shuffled answers"
    with run.phase("shuffled-label control", f"{last} steps on {others}"):
        control = run.open_session()
        run.attach_adapter(control, fresh=True)  # compared, as the run is, with the base
        wanted = chain(rows, compared_pairs(asked) if asked else ())
        other = replace(run, objective=run.objective_of(control, wanted))
        for event in training_events(other, control, rows, last=last):
            if isinstance(event, StepDone):
                run.listener(event)
        run.group.restore(control)
        return what_is_compared(control, run.prepared, asked, other.objective) if asked else None


def _anybody_stops(run: Run, *, stops: bool) -> bool:
    """Whether training ends here; the first process decides, and every process must ask."""
    return run.group.total(stops) > 0


def _begin(run: Run, *, resume: bool) -> None:
    if not resume:
        run.folder.make()
        run.folder.claim()
        RunFolder.place(run.folder.path)  # again: another process may have made its run there while this one loaded
    if run.lengthened is not None:
        # In this order, so that a run killed in between is unfinished, and its checkpoints are known as its own.
        with storage_errors(run.folder.manifest):
            run.folder.manifest.unlink(missing_ok=True)
        run.tell(run.lengthened)
        run.folder.secure_events()
    run.folder.tidy()
    if not resume or run.lengthened is not None:
        write_text(run.folder.plan, dump_plan(run.prepared.plan))
    if not resume:
        run.tell(run.started)
    run.open_trackers(resumed=resume)


def _finish(run: Run, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write the reports, and the manifest last: from then on the run exists."""
    folder = run.folder
    _write_card(run, record)
    write_json(folder.report_data, build_report(record))
    # Whatever the manifest names is on disk before it.
    folder.secure_events()
    artifacts = folder.describe()
    write_text(folder.report_page, render_html([{**record, "artifacts": artifacts}]))
    page = describe_file(folder.report_page, name=folder.report_page.name)
    finished = {**record, "artifacts": sorted([*artifacts, page], key=lambda file: PurePath(file["path"]))}
    folder.write_manifest(finished)
    return finished


def _write_card(run: Run, record: Mapping[str, Any]) -> None:
    """The model card, beside what was trained; a base whose own card cannot be read has no licence that is known."""
    try:
        licence = licence_in(run.prepared.location.folder)
    except ModelError:
        licence = ""
    whole = run.prepared.target is None
    saved = run.folder.model if whole else run.folder.adapter
    write_text(saved / CARD, model_card(record, licence, "model" if whole else "adapter"))
