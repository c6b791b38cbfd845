"""The order of a fine-tune, from a configuration to a report; the only file that knows it."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.artifacts.checkpoints import CheckpointStore
from finetune.artifacts.left import what_is_left
from finetune.artifacts.run_folder import RunFolder
from finetune.artifacts.write import describe_files, write_folder, write_json, write_text
from finetune.assembly.observe import (
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
from finetune.assembly.prepare import Prepared, packed_sample, prepare
from finetune.assembly.record import Course, run_identity, run_record
from finetune.assembly.steps import training_steps
from finetune.backends import open_backend
from finetune.config import LoadedConfig, dump_plan, resolve_processes
from finetune.criteria.evidence import Evidence
from finetune.criteria.judge import judge
from finetune.errors import FineTuneError, InterruptedRunError, LostProcessError
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
from finetune.place import launch_words
from finetune.ports import Backend, Group, Session
from finetune.records import Optimization, Tokenized
from finetune.report import build_report, render_html
from finetune.training.packing import check_packing
from finetune.training.team import check_same

Listener = Callable[[Event], None]


@dataclass
class _Run:
    """One run in progress: who listens, where it writes, and how long its phases took."""

    prepared: Prepared
    backend: Backend
    group: Group
    folder: RunFolder
    listener: Listener
    timing: dict[str, float] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What its checkpoints belong to."""
        return run_identity(self.prepared)

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
    begun = RunStarted(datetime.now(UTC).isoformat(timespec="seconds"), command)
    clock = time.perf_counter()
    backend = open_backend(loaded.config.backend)
    group = backend.join()
    listener = (lambda event: None) if group.rank else listener
    listener(PhaseStarted("prepare", f"{loaded.config.model.path}"))
    prepared = prepare(resolve_processes(loaded, group.size, resume=resume))
    folder = RunFolder.unfinished(output) if resume else RunFolder.place(None if group.rank else output)
    run = _Run(prepared, backend, group, folder, listener, {"prepare": time.perf_counter() - clock})
    if group.rank:
        return folder.path, _assist(run)
    try:
        if resume:
            folder.claim()
        session, before, fingerprints = _open(run)
        # Only now, when nothing can be refused any more, is anything written.
        _begin(run, begun, resume=resume)
        done = _train(run, session, before)
        _save_adapter(run, session)
        with run.phase("observe tuned"):
            after = observe(session, prepared)
        run.tell(FixedLoss(prepared.total_steps, *after.fixed))
        events = folder.read_events()
        evidence = _collect(run, session, (before, after, fingerprints), events)
        verdicts = judge(evidence)
        run.timing["total"] = time.perf_counter() - clock
        told = next((event for event in events if event["event"] == RunStarted.__name__), event_as_dict(begun))
        course = Course(folder.path.name, told["command"], told["started"], run.timing, backend.versions(), done)
        return folder.path, _finish(run, run_record(prepared, course, evidence, verdicts, events))
    except (KeyboardInterrupt, LostProcessError) as error:
        raise _ended(run, error) from None
    finally:
        folder.release()


def _ended(run: _Run, error: BaseException) -> FineTuneError:
    kept, hint = what_is_left(run.folder, launch=launch_words(os.environ, run.group.size))
    if isinstance(error, LostProcessError):
        return LostProcessError(f"{error.message}; {kept}", hint=hint)
    return InterruptedRunError(f"interrupted; {kept}", hint=hint)


def _assist(run: _Run) -> dict[str, Any]:
    """Train along, the sham control too, as all processes but the first do: they write, judge and tell nothing."""
    session = _session(run)
    _attach(run, session)
    deque(_steps(run, session, run.prepared.training_rows, done=_restore(run, session)), maxlen=0)
    if rows := rows_of_sham(run.prepared, {}):
        sham = _session(run)
        _attach(run, sham)
        deque(_steps(run, sham, rows), maxlen=0)
    return {}


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
    session.prepare_updates(Optimization(training.weight_decay, training.max_grad_norm))


def _steps(run: _Run, session: Session, rows: tuple[Tokenized, ...], *, done: int = 0) -> Iterator[Event]:
    return training_steps(session, run.prepared, rows, run.group, done=done)


def _restore(run: _Run, session: Session) -> int:
    """Go on from the newest checkpoint, every process from the same one; returns its step, 0 for a new run."""
    store = CheckpointStore(run.folder.checkpoints)
    done = store.newest() or 0
    if done:
        session.load_state(store.open(done, run.identity))
    check_same(run.group, {**run.identity, **run.backend.versions(), "the step to go on from": done})
    return done


def _train(run: _Run, session: Session, before: Observation) -> int:
    """Train from the newest checkpoint to the end; returns the step it went on from, 0 for a new run."""
    store = CheckpointStore(run.folder.checkpoints)
    every = run.prepared.plan.config.training.save_every
    done = _restore(run, session)
    if run.prepared.plan.config.training.packing:
        with run.phase("check packing", "rows that share a sequence must not see each other"):
            check_packing(session, packed_sample(run.prepared), run.prepared.plan.config.model.dtype)
    run.folder.rewind_events(done)
    if not done:
        run.tell(FixedLoss(0, *before.fixed))
        if before.held_out:
            run.tell(HeldOutLoss(0, *before.held_out))
    crowd = f", in {run.group.size} processes" if run.group.size > 1 else ""
    with run.phase("train", f"{run.prepared.total_steps} steps, from step {done}{crowd}"):
        for event in _steps(run, session, run.prepared.training_rows, done=done):
            run.tell(event)
            if isinstance(event, StepDone) and (event.step % (every or 1) == 0 or event.step == event.total_steps):
                path = store.save(event.step, session.save_state, run.identity)
                run.tell(CheckpointSaved(event.step, path.relative_to(run.folder.path).as_posix()))
    return done


def _save_adapter(run: _Run, session: Session) -> None:
    encoder = run.prepared.encoder

    def fill(folder: Path) -> None:
        session.save_adapter(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            source = run.prepared.location.folder / name
            if source.exists():
                (folder / name).write_bytes(source.read_bytes())
        # The template trained on travels with the adapter, whichever the model shipped.
        (folder / "chat_template.jinja").write_text(encoder.source.jinja, encoding="utf-8")
        # So does where to stop: without it a model that learned to stop is asked to go on.
        write_json(folder / "generation_config.json", encoder.generation_settings())

    with run.phase("save adapter"):
        write_folder(run.folder.adapter, fill)


def _collect(
    run: _Run, session: Session, looks: tuple[Observation, Observation, dict[str, str]], events: list[dict[str, Any]]
) -> Evidence:
    prepared, (before, after, fingerprints) = run.prepared, looks
    steps = [event for event in events if event["event"] == "StepDone"]
    told = (event["norms"] for event in events if event["event"] == FirstGradients.__name__)
    gradients: dict[str, float] = next(told, {})
    parameters = parameter_evidence(session, fingerprints, gradients, len(steps))
    with run.phase("check adapter", "in a fresh process, on a fresh base"):
        files = describe_files(run.folder.path)
        artifacts = artifact_evidence(prepared, session, run.folder.adapter, files, run.why)

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
    unable = frozenset({"memory"}) - run.backend.abilities
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
