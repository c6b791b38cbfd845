"""The order of a fine-tune, from a configuration to a report; the only file that knows it."""

import os
import secrets
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.backends import open_backend
from finetune.config import LoadedConfig, dump_plan, resolve_processes
from finetune.criteria.evidence import Evidence
from finetune.criteria.judge import judge, overall
from finetune.distributed.environment import launch_words
from finetune.errors import FineTuneError, InterruptedRunError, LostProcessError, OutOfMemoryError
from finetune.events import FirstGradients, FixedLoss, PhaseStarted, RunJudged, RunStarted, StepDone, event_as_dict
from finetune.evidence.observe import (
    Observation,
    artifact_evidence,
    learning_evidence,
    loss_evidence,
    memory_evidence,
    observe,
    parameter_evidence,
    rows_of_sham,
    wanted,
)
from finetune.evidence.record import Course, run_owner, run_record
from finetune.evidence.saved import save_trained
from finetune.files import write_folder, write_json, write_text
from finetune.ports import Session
from finetune.records import Optimization, Tokenized, Verdict
from finetune.report import build_report, render_html
from finetune.run.folder import RunFolder
from finetune.run.resume_hint import what_is_left
from finetune.tracking.choose import require_trackers
from finetune.training.course import Trained, claim_resumed, steps_of, train_along, train_run
from finetune.training.out_of_memory import with_estimate
from finetune.training.prepare import prepare
from finetune.training.run import Listener, Run


def fine_tune(
    loaded: LoadedConfig,
    *,
    output: Path | None = None,
    resume: bool = False,
    command: str = "ft train",
    listener: Listener = lambda event: None,
) -> tuple[Path, dict[str, Any]]:
    """Fine-tune as configured, judge the result on measured evidence, and write the run folder.

    Of several processes that a launcher has started, the first does all this and the others train along.

    Args:
        output: the run folder to make (or, with `resume`, to continue); by default one below `runs/`.
        command: what to write down as the command that repeats the run.
        listener: is told every event.

    Returns:
        The run folder and the content of its `run.json`; a process that only trained along has nothing to tell.

    Raises:
        FineTuneError: something was refused, failed, or was interrupted; see `finetune.errors`.
    """
    begun = RunStarted(datetime.now(UTC).isoformat(timespec="seconds"), command, secrets.token_hex(8))
    clock = time.perf_counter()
    backend = open_backend(loaded.config.backend)
    require_trackers(loaded.config.tracking.to)
    group = backend.join()
    listener = (lambda event: None) if group.rank else listener
    listener(PhaseStarted("prepare", f"{loaded.config.model.path}"))
    prepared = prepare(resolve_processes(loaded, group.size, resume=resume))
    folder = RunFolder.unfinished(output) if resume else RunFolder.place(None if group.rank else output)
    run = Run(prepared, backend, group, folder, listener, {"prepare": time.perf_counter() - clock})
    if group.rank:
        return folder.path, _assist(run)
    try:
        owner = run_owner(prepared, backend.versions())
        if resume:
            claim_resumed(run, owner)
        session, before, fingerprints = _open(run)
        # Only now, when nothing can be refused any more, is anything written.
        _begin(run, begun, resume=resume)
        trained = train_run(run, session, before, owner)
        saved = _save(run, session)
        with run.phase("observe tuned"):
            after = observe(session, prepared)
        run.tell(FixedLoss(trained.kept, *after.fixed))
        evidence = _collect(run, session, saved, (before, after, fingerprints), trained)
        verdicts = judge(evidence)
        run.tell(RunJudged(overall(verdicts), {verdict.id: verdict.outcome for verdict in verdicts}))
        run.close_trackers(complete=True)
        run.timing["total"] = time.perf_counter() - clock
        return folder.path, _finish(run, _record(run, begun, trained, evidence, verdicts))
    except (KeyboardInterrupt, LostProcessError) as error:
        raise _ended(run, error) from None
    except (MemoryError, OutOfMemoryError) as error:
        raise with_estimate(error, prepared, what_is_left(run.folder)[0]) from None
    finally:
        run.let_go()


def _ended(run: Run, error: BaseException) -> FineTuneError:
    kept, hint = what_is_left(run.folder, launch=launch_words(os.environ, run.group.size))
    if isinstance(error, LostProcessError):
        return LostProcessError(f"{error.message}; {kept}", hint=hint)
    return InterruptedRunError(f"interrupted; {kept}", hint=hint)


def _assist(run: Run) -> dict[str, Any]:
    """Train along, the sham control too, as all processes but the first do: they write, judge and tell nothing."""
    session = _session(run)
    _attach(run, session)
    kept = train_along(run, session, run_owner(run.prepared, run.backend.versions()))
    if rows := rows_of_sham(run.prepared, {}):
        sham = _session(run)
        _attach(run, sham)
        deque(steps_of(run, sham, rows, last=kept), maxlen=0)
        run.group.restore(sham)
    return {}


def _begin(run: Run, begun: RunStarted, *, resume: bool) -> None:
    if not resume:
        run.folder.make()
        run.folder.claim()
        RunFolder.place(run.folder.path)  # again: another process may have made its run there while this one loaded
    run.folder.tidy()
    if not resume:
        write_text(run.folder.plan, dump_plan(run.prepared.plan))
        run.tell(begun)
    run.open_trackers(resumed=resume)


def _open(run: Run) -> tuple[Session, Observation, dict[str, str]]:
    prepared = run.prepared
    with run.phase("load", f"{prepared.location.name}, {prepared.shape.parameters / 1e6:.2f} M parameters"):
        session = _session(run)
        run.device = session.device
    with run.phase("observe base"):
        before = observe(session, prepared)
    with run.phase("attach"):
        _attach(run, session)
    return session, before, session.fingerprints()


def _session(run: Run) -> Session:
    model, pad_id = run.prepared.plan.config.model, run.prepared.encoder.tokenizer.pad_id
    return run.backend.open(
        run.prepared.location, model.dtype, pad_id, quantize=model.quantization, device=model.device
    )


def _attach(run: Run, session: Session) -> None:
    training = run.prepared.plan.config.training
    session.attach(run.prepared.target, training.seed)
    if run.prepared.target is None:
        session.check_saving()
    ratio = training.lora_plus_ratio
    session.prepare_updates(Optimization(training.weight_decay, training.max_grad_norm, lora_plus_ratio=ratio))


def _save(run: Run, session: Session) -> Path:
    """Save what was trained, the adapter or the whole model, with all that belongs to it; returns its folder."""
    path = run.folder.model if run.prepared.target is None else run.folder.adapter
    with run.phase(f"save {path.name}"):
        write_folder(path, lambda folder: save_trained(run.prepared, session, folder))
    return path


def _collect(
    run: Run,
    session: Session,
    saved: Path,
    looks: tuple[Observation, Observation, dict[str, str]],
    trained: Trained,
) -> Evidence:
    prepared, (before, after, fingerprints) = run.prepared, looks
    events = run.folder.read_events()
    # The steps that the kept weights are made of; what came after the best step has left nothing behind.
    steps = [event for event in events if event["event"] == StepDone.__name__ and event["step"] <= trained.kept]
    told = (event["norms"] for event in events if event["event"] == FirstGradients.__name__)
    gradients: dict[str, float] = next(told, {})
    parameters = parameter_evidence(prepared, session, fingerprints, gradients, len(steps))
    with run.phase(f"check {saved.name}", "in a fresh process" + (", on a fresh base" if prepared.target else "")):
        files = run.folder.describe()
        artifacts = artifact_evidence(prepared, session, saved, files, run.why)

    def train_sham(rows: tuple[Tokenized, ...]) -> Session:
        with run.phase("sham control", "the same steps on shuffled answers"):
            sham = _session(run)
            _attach(run, sham)
            for event in steps_of(run, sham, rows, last=trained.kept):
                if isinstance(event, StepDone):
                    run.listener(event)
            run.group.restore(sham)
        return sham

    learning = learning_evidence(prepared, before, after, train_sham, run.why)
    memory = None
    full_too = prepared.target is not None and not prepared.shape.quantized
    unable = frozenset({"memory"}) - (run.backend.abilities if full_too else frozenset())
    if wanted(prepared, "memory", run.why, unable):
        with run.phase("measure memory", "LoRA and full fine-tuning, each in a fresh process"):
            memory = memory_evidence(prepared, run.why)
    losses = loss_evidence(prepared, [step["loss"] for step in steps], before, after)
    return Evidence(losses, parameters, artifacts, learning, memory, run.why, unable)


def _record(
    run: Run, begun: RunStarted, trained: Trained, evidence: Evidence, verdicts: tuple[Verdict, ...]
) -> dict[str, Any]:
    """What `run.json` says; of a resumed run the command and the time are those that it was begun with."""
    events = run.folder.read_events()
    told = next((event for event in events if event["event"] == RunStarted.__name__), event_as_dict(begun))
    versions = run.backend.versions()
    course = Course(run.folder.path.name, told["command"], told["started"], run.timing, versions, trained)
    return run_record(run, course, evidence, verdicts, events)


def _finish(run: Run, record: dict[str, Any]) -> dict[str, Any]:
    """Write the reports, and the manifest last: from then on the run exists."""
    folder = run.folder
    write_json(folder.report_data, build_report(record))
    listed = {**record, "artifacts": folder.describe()}
    write_text(folder.report_page, render_html([listed]))
    # Whatever the manifest names is on disk before it.
    folder.secure_events()
    record = {**record, "artifacts": folder.describe()}
    folder.write_manifest(record)
    return record
