"""Shows a run while it goes: a live bar on a terminal, plain lines anywhere else. A consumer of events."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from finetune.events import (
    CheckpointSaved,
    Event,
    HeldOutLoss,
    PhaseStarted,
    RunLengthened,
    RunResumed,
    StepDone,
    StoppedEarly,
    TrackerFailed,
    TrackerOpened,
)
from finetune.words import in_a_line

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_LINES = 10
_PHASES = {
    "prepare": "reading model and data",
    "load": "loading the model",
    "observe base": "evaluating the base model",
    "attach": "adding the adapter",
    "train": "training",
    "observe tuned": "evaluating the tuned model",
    "check adapter": "reloading the adapter",
    "check model": "reloading the model",
    "shuffled-label control": "control run",
    "measure memory": "measuring memory",
}
"""What a phase is called while it goes; every other as in `run.json`."""


class Progress:
    """Listens to a run's events and shows them on standard error."""

    def __init__(self) -> None:
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._what = ""

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[words]}"),
                TimeRemainingColumn(),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, PhaseStarted):
            self._what = _PHASES.get(event.phase, event.phase)
            self._task = None
            self._line(f"{self._what}: {event.note}" if event.note else self._what)
        elif isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, HeldOutLoss) and event.step:
            self._line(f"  held-out loss {event.loss:.4f} at step {event.step}")
        elif isinstance(event, CheckpointSaved) and event.step:
            self._line(f"  checkpoint {event.path}")
        elif isinstance(event, StoppedEarly):
            self._stopped(event)
        elif isinstance(event, RunResumed | RunLengthened | TrackerOpened | TrackerFailed):
            self._tell(event)

    def _tell(self, event: RunResumed | RunLengthened | TrackerOpened | TrackerFailed) -> None:
        if isinstance(event, RunLengthened):
            self._line(
                f"  longer: from {event.planned_steps} to {event.total_steps} steps, {event.step} of them done; the "
                "learning rate of those to come is that of a run planned so from its start"
            )
        elif isinstance(event, TrackerOpened):
            self._line(f"  tracker {event.tracker} writes to {event.place}")
        elif isinstance(event, TrackerFailed):
            self._line(f"  warning: tracker {event.tracker} failed, and the run goes on: {event.error}")
        else:
            self._line(f"  resumed from step {event.step}")
            for change in event.changes:
                self._line(f"  warning: not as it was: {change}")

    def _stopped(self, event: StoppedEarly) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=event.step)
        self._line(
            f"  stopping early, at step {event.step} of {event.total_steps}: no better held-out loss for "
            f"{event.looks} looks; the best was {event.best_loss:.4f} at step {event.best_step}"
        )

    def _step(self, event: StepDone) -> None:
        words = f"loss {event.loss:.4f}  {event.tokens_per_second:,.0f} tokens/s"
        every = max(1, event.total_steps // _LINES)
        if event.step == 1 or event.step % every == 0 or event.step == event.total_steps:
            self._line(f"  step {event.step}/{event.total_steps}  {words}  lr {event.learning_rate:.2e}")
        if self._bar is None:
            return
        if self._task is None:
            self._task = self._bar.add_task(f"  {self._what}", total=event.total_steps, words=words)
        self._bar.update(self._task, completed=event.step, words=words)

    def _line(self, text: str) -> None:
        if self._bar is None:
            sys.stderr.write(f"{in_a_line(text)}\n")
            sys.stderr.flush()
        else:
            self._bar.console.print(in_a_line(text), markup=False, highlight=False)
