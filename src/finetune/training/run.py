"""One run in progress: who listens, where it writes, and how long its phases take."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from finetune.config import plan_as_list
from finetune.events import Event, PhaseStarted, RunLengthened, RunStarted
from finetune.objectives import choose_objective
from finetune.objectives.cross_entropy import CROSS_ENTROPY
from finetune.ports import Backend, Group, Objective, Session
from finetune.records import Optimization, TokenizedRow
from finetune.run.checkpoints import CheckpointStore
from finetune.run.folder import RunFolder
from finetune.tracking.consumer import Trackers
from finetune.tracking.tracker import Tracked
from finetune.training.longer import earlier_lengths
from finetune.training.prepare import Prepared
from finetune.training.start import Beginning, Start

Listener = Callable[[Event], None]


@dataclass
class Run:
    """One run in progress; `why` says of each thing that is not measured why it is not, `device` where it computes.

    `planned`: as it was planned before, where it is resumed to be longer; `lengthened` then says what that changes.
    """

    prepared: Prepared
    backend: Backend
    group: Group
    folder: RunFolder
    listener: Listener
    timing: dict[str, float] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    trackers: Trackers | None = None
    device: str = ""
    started: RunStarted = field(default_factory=lambda: RunStarted("", ""))
    planned: Prepared | None = None
    lengthened: RunLengthened | None = None
    start: Start | None = None
    beginning: Beginning | None = None
    objective: Objective = CROSS_ENTROPY

    def checkpoints(self, *, pinned: int = 0) -> CheckpointStore:
        """The checkpoints of the run, those included that it wrote before it was made longer."""
        return CheckpointStore(
            self.folder.checkpoints, pinned=pinned, earlier=earlier_lengths(self.folder, self.planned)
        )

    def open_session(self) -> Session:
        """The base model of the run, without an adapter."""
        config, pad_id = self.prepared.plan.config, self.prepared.encoder.tokenizer.pad_id
        return self.backend.open(
            self.prepared.location, config.model.dtype, pad_id, quantize=config.quantization, device=config.model.device
        )

    def attach_adapter(self, session: Session, *, fresh: bool = False) -> None:
        """Put an adapter on the base as configured, or make all of it trainable, with an optimizer for it.

        Args:
            fresh: the adapter is a new one even where the run goes on from another.
        """
        training = self.prepared.plan.config.training
        session.attach(self.prepared.target, training.seed)
        if self.start is not None and not fresh:
            self.start.put_on(session, self.prepared.location.name)
        if self.prepared.target is None:
            session.check_saving()
        session.prepare_updates(
            Optimization(
                training.weight_decay,
                training.max_grad_norm,
                loraplus_lr_ratio=training.loraplus_lr_ratio,
                gradient_checkpointing=training.gradient_checkpointing,
            )
        )

    def settle_objective(self, session: Session) -> None:
        """Choose what a step minimises; preferences are measured from the session as it is now, at step 0.

        It is asked anew when a run is resumed: the same base and first adapter say the same.
        """
        self.objective = self.objective_of(session, self.prepared.training_rows)

    def objective_of(self, session: Session, rows: Iterable[TokenizedRow]) -> Objective:
        """The objective of training this session on these rows, from what it says now."""
        held_out = self.prepared.held_out
        every = chain(rows, held_out.rows if held_out else ())
        return choose_objective(self.prepared.plan.config.training, session, every)

    def tell(self, event: Event) -> None:
        """Log an event and pass it on."""
        self.folder.log(event)
        self.listener(event)
        if self.trackers is not None:
            self.trackers(event)

    def open_trackers(self, *, resumed: bool) -> None:
        """From now on trackers, too, are told, and first of what was done before the run was resumed."""
        tracking = self.prepared.plan.config.tracking
        if not tracking.to:
            return
        done = CheckpointStore(self.folder.checkpoints).newest() or 0
        history = self.folder.events_up_to(done)
        tracked = Tracked(
            id=next((event.id for event in history if isinstance(event, RunStarted)), self.folder.path.name),
            name=tracking.name or self.folder.path.resolve().name,
            project=tracking.project,
            folder=self.folder.path,
            parameters={entry["key"]: entry["value"] for entry in plan_as_list(self.prepared.plan)},
            resumed=resumed,
        )
        self.trackers = Trackers(tracking.to, tracked, self.listener, history)

    def close_trackers(self, *, complete: bool) -> None:
        """Have trackers write what they were told; closing twice does nothing more."""
        if self.trackers is not None:
            self.trackers.close(complete=complete)

    def let_go(self) -> None:
        """Leave the run, however it ended: trackers write what they have, and others may take hold of the folder."""
        try:
            self.close_trackers(complete=False)
        finally:
            self.folder.release()

    @contextlib.contextmanager
    def phase(self, name: str, note: str = "") -> Iterator[None]:
        """Tell that a phase starts, and keep its time in seconds."""
        self.listener(PhaseStarted(name, note))
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timing[name] = self.timing.get(name, 0.0) + time.perf_counter() - started
