"""The order of a fine-tune, from a configuration to a report; the only file that knows it."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.artifacts.checkpoints import CheckpointStore
from finetune.artifacts.run_folder import RunFolder
from finetune.artifacts.write import describe_files, write_folder, write_json, write_text
from finetune.assembly.observe import (
    Observation,
    artifact_evidence,
    held_out_batches,
    learning_evidence,
    loss_evidence,
    memory_evidence,
    observe,
    parameter_evidence,
    wanted,
)
from finetune.assembly.prepare import Prepared, pack_length, packed_sample, prepare
from finetune.assembly.record import Course, run_identity, run_record
from finetune.backends import open_backend
from finetune.config import LoadedConfig, dump_plan
from finetune.criteria.evidence import Evidence
from finetune.criteria.judge import judge
from finetune.errors import InterruptedRunError
from finetune.events import (
    CheckpointSaved,
    Event,
    FirstGradients,
    FixedLoss,
    HeldOutLoss,
    PhaseStarted,
    RunStarted,
    StepDone,
    event_as_dict,
)
from finetune.ports import Backend, Session
from finetune.records import Batch, Optimization, Tokenized
from finetune.report import build_report, render_html
from finetune.tokens.batch import epoch_batches
from finetune.training.loop import LoopPlan, train
from finetune.training.packing import check_packing

Listener = Callable[[Event], None]


@dataclass
class _Run:
    """One run in progress: who listens, where it writes, and how long its phases took."""

    prepared: Prepared
    backend: Backend
    folder: RunFolder
    listener: Listener
    timing: dict[str, float] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def tell(self, event: Event) -> None:
        """Log an event and pass it on."""
        self.folder.log(event)
        self.listener(event)

    @contextlib.contextmanager
    def phase(self, name: str, note: str = "") -> Iterator[None]:
        """Tell that a phase starts, and keep its time in seconds."""
        self.listener(PhaseStarted(name, note))
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timing[name] = self.timing.get(name, 0.0) + time.perf_counter() - started


def fine_tune(
    loaded: LoadedConfig,
    *,
    output: Path | None = None,
    resume: bool = False,
    command: str = "ft train",
    listener: Listener = lambda event: None,
) -> tuple[Path, dict[str, Any]]:
    """Fine-tune as configured, judge the result on measured evidence, and write the run folder.

    Args:
        output: the run folder to make (or, with `resume`, to continue); by default one below `runs/`.
        command: what to write down as the command that repeats the run.
        listener: is told every event.

    Returns:
        The run folder and the content of its `run.json`.

    Raises:
        FineTuneError: something was refused, failed, or was interrupted; see `finetune.errors`.
    """
    begun = RunStarted(datetime.now(UTC).isoformat(timespec="seconds"), command)
    clock = time.perf_counter()
    backend = open_backend(loaded.config.backend)
    listener(PhaseStarted("prepare", f"{loaded.config.model.path}"))
    prepared = prepare(loaded)
    folder = RunFolder.unfinished(output) if resume else RunFolder.place(output)
    run = _Run(prepared, backend, folder, listener, {"prepare": time.perf_counter() - clock})
    try:
        if resume:
            folder.claim()
        session, before, fingerprints = _open(run)
        # Only now, when nothing can be refused any more, is anything written.
        _begin(run, begun, resume=resume)
        done = _train(run, session, before)
        saved = _save(run, session)
        with run.phase("observe tuned"):
            after = observe(session, prepared)
        run.tell(FixedLoss(prepared.total_steps, *after.fixed))
        events = folder.read_events()
        evidence = _collect(run, session, saved, (before, after, fingerprints), events)
        verdicts = judge(evidence)
        run.timing["total"] = time.perf_counter() - clock
        told = next((event for event in events if event["event"] == RunStarted.__name__), event_as_dict(begun))
        course = Course(folder.path.name, told["command"], told["started"], run.timing, backend.versions(), done)
        return folder.path, _finish(run, run_record(prepared, course, evidence, verdicts, events))
    except KeyboardInterrupt:
        raise _interrupted(folder) from None
    finally:
        folder.release()


def _interrupted(folder: RunFolder) -> InterruptedRunError:
    if not folder.plan.exists():
        return InterruptedRunError("interrupted before anything was written")
    newest = CheckpointStore(folder.checkpoints).newest()
    kept = f"the checkpoint of step {newest} is intact" if newest else "no checkpoint had been written yet"
    return InterruptedRunError(f"interrupted; {kept}", hint=f"go on with: ft train --resume --output {folder.path}")


def _begin(run: _Run, begun: RunStarted, *, resume: bool) -> None:
    if resume:
        run.folder.tidy()
        return
    run.folder.make()
    run.folder.claim()
    write_text(run.folder.plan, dump_plan(run.prepared.plan))
    run.tell(begun)


def _open(run: _Run) -> tuple[Session, Observation, dict[str, str]]:
    prepared = run.prepared
    with run.phase("load", f"{prepared.location.name}, {prepared.shape.parameters / 1e6:.2f} M parameters"):
        session = _session(run)
    with run.phase("observe base"):
        before = observe(session, prepared)
    with run.phase("attach"):
        _attach(run, session)
    return session, before, session.fingerprints()


def _session(run: _Run) -> Session:
    config = run.prepared.plan.config
    return run.backend.open(run.prepared.location, config.model.dtype, run.prepared.encoder.tokenizer.pad_id)


def _attach(run: _Run, session: Session) -> None:
    training = run.prepared.plan.config.training
    session.attach(run.prepared.target, training.seed)
    if run.prepared.target is None:
        session.check_saving()
    ratio = training.lora_plus_ratio
    session.prepare_updates(Optimization(training.weight_decay, training.max_grad_norm, lora_plus_ratio=ratio))


def _steps(run: _Run, session: Session, rows: tuple[Tokenized, ...], *, done: int = 0) -> Iterator[Event]:
    training = run.prepared.plan.config.training
    assert training.evaluate_every is not None
    plan = LoopPlan(
        total_steps=run.prepared.total_steps,
        accumulation=training.accumulation,
        peak_learning_rate=training.learning_rate,
        warmup_steps=round(training.warmup_fraction * run.prepared.total_steps),
        schedule=training.schedule,
        evaluate_every=training.evaluate_every,
    )
    length = pack_length(run.prepared.plan)

    def batches_of(epoch: int) -> list[Batch]:
        return epoch_batches(rows, training.batch_size, seed=training.seed, epoch=epoch, pack_length=length)

    return train(session, batches_of, held_out_batches(run.prepared), plan, done_steps=done)


def _train(run: _Run, session: Session, before: Observation) -> int:
    """Train from the newest checkpoint to the end; returns the step it went on from, 0 for a new run."""
    store = CheckpointStore(run.folder.checkpoints)
    every = run.prepared.plan.config.training.save_every
    identity = run_identity(run.prepared)
    done = store.newest() or 0
    if done:
        session.load_state(store.open(done, identity))
    if run.prepared.plan.config.training.packing:
        with run.phase("check packing", "rows that share a sequence must not see each other"):
            check_packing(session, packed_sample(run.prepared), run.prepared.plan.config.model.dtype)
    run.folder.rewind_events(done)
    if not done:
        run.tell(FixedLoss(0, *before.fixed))
        if before.held_out:
            run.tell(HeldOutLoss(0, *before.held_out))
    with run.phase("train", f"{run.prepared.total_steps} steps, from step {done}"):
        for event in _steps(run, session, run.prepared.training_rows, done=done):
            run.tell(event)
            if isinstance(event, StepDone) and (event.step % (every or 1) == 0 or event.step == event.total_steps):
                path = store.save(event.step, session.save_state, identity)
                run.tell(CheckpointSaved(event.step, path.relative_to(run.folder.path).as_posix()))
    return done


def _save(run: _Run, session: Session) -> Path:
    """Save what was trained, the adapter or the whole model, with all that belongs to it; returns its folder."""
    encoder, adapter = run.prepared.encoder, run.prepared.target is not None

    def fill(folder: Path) -> None:
        session.save_adapter(folder) if adapter else session.save_model(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            source = run.prepared.location.folder / name
            if source.exists():
                (folder / name).write_bytes(source.read_bytes())
        # The template trained on travels along, whichever the model shipped.
        (folder / "chat_template.jinja").write_text(encoder.source.jinja, encoding="utf-8")
        # So does where to stop: without it a model that learned to stop is asked to go on.
        write_json(folder / "generation_config.json", encoder.generation_settings())

    path = run.folder.adapter if adapter else run.folder.model
    with run.phase(f"save {path.name}"):
        write_folder(path, fill)
    return path


def _collect(
    run: _Run,
    session: Session,
    saved: Path,
    looks: tuple[Observation, Observation, dict[str, str]],
    events: list[dict[str, Any]],
) -> Evidence:
    prepared, (before, after, fingerprints) = run.prepared, looks
    steps = [event for event in events if event["event"] == "StepDone"]
    told = (event["norms"] for event in events if event["event"] == FirstGradients.__name__)
    gradients: dict[str, float] = next(told, {})
    parameters = parameter_evidence(prepared, session, fingerprints, gradients, len(steps))
    with run.phase(f"check {saved.name}", "in a fresh process" + (", on a fresh base" if prepared.target else "")):
        files = describe_files(run.folder.path)
        artifacts = artifact_evidence(prepared, session, saved, files, run.why)

    def train_sham(rows: tuple[Tokenized, ...]) -> Session:
        with run.phase("sham control", "the same steps on shuffled answers"):
            sham = _session(run)
            _attach(run, sham)
            for event in _steps(run, sham, rows):
                if isinstance(event, StepDone):
                    run.listener(event)
        return sham

    learning = learning_evidence(prepared, before, after, train_sham, run.why)
    memory = None
    unable = frozenset({"memory"}) - (run.backend.abilities if prepared.target else frozenset())
    if wanted(prepared, "memory", run.why, unable):
        with run.phase("measure memory", "LoRA and full fine-tuning, each in a fresh process"):
            memory = memory_evidence(prepared, run.why)
    losses = loss_evidence(prepared, [step["loss"] for step in steps], before, after)
    return Evidence(losses, parameters, artifacts, learning, memory, run.why, unable)


def _finish(run: _Run, record: dict[str, Any]) -> dict[str, Any]:
    """Write the reports, and the manifest last: from then on the run exists."""
    folder = run.folder
    write_json(folder.report_data, build_report(record))
    listed = {**record, "artifacts": describe_files(folder.path)}
    write_text(folder.report_page, render_html([listed]))
    record = {**record, "artifacts": describe_files(folder.path)}
    folder.write_manifest(record)
    return record
