"""What a training run tells while it goes; progress bar, log, checkpoints and report listen."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run began: when (ISO 8601, UTC), the command that repeats it, and an id that no other run has.

    `made_from`: of what its base was made, where that lies in the cache.
    """

    started: str
    command: str
    id: str = ""
    made_from: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunResumed:
    """A run went on after `step`; `changes` says what is not as it was, and was allowed to change."""

    step: int
    changes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step. `loss`: nats per trained token of this step's batches, before the update."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    rss: int

    @property
    def tokens_per_second(self) -> float:
        """Real tokens (padding not counted) per second of this step."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Loss on held-out rows, in nats per token, token-weighted, dropout off."""

    step: int
    loss: float
    tokens: int


@dataclass(frozen=True, slots=True)
class FixedLoss:
    """Loss on the same fixed training batches, dropout off: the honest before and after."""

    step: int
    loss: float
    tokens: int


@dataclass(frozen=True, slots=True)
class RunLengthened:
    """After `step` the run is planned anew, to end with `total_steps`; `before` are the settings that were replaced."""

    step: int
    planned_steps: int
    total_steps: int
    before: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class FirstGradients:
    """The L2 norm of every trainable tensor's gradient at step 1, before any weight has changed."""

    norms: dict[str, float]


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A complete checkpoint lies at `path`."""

    step: int
    path: str


@dataclass(frozen=True, slots=True)
class StoppedEarly:
    """Training ends with `step`: the held-out loss has not improved for `looks` looks; `best_step` had the lowest."""

    step: int
    total_steps: int
    looks: int
    best_step: int
    best_loss: float


@dataclass(frozen=True, slots=True)
class RunJudged:
    """The judges have spoken: the run's outcome, and that of each verdict by its id."""

    outcome: str
    verdicts: dict[str, str]


@dataclass(frozen=True, slots=True)
class PhaseStarted:
    """The run turned to something new; `note` says why or how large."""

    phase: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class TrackerOpened:
    """A tracker is told of the run from now on; `place` is where it writes."""

    tracker: str
    place: str


@dataclass(frozen=True, slots=True)
class TrackerFailed:
    """A tracker could not take what it was told; the run goes on without it."""

    tracker: str
    error: str


Event = (
    RunStarted
    | RunResumed
    | RunLengthened
    | StepDone
    | HeldOutLoss
    | FixedLoss
    | FirstGradients
    | CheckpointSaved
    | StoppedEarly
    | RunJudged
    | PhaseStarted
    | TrackerOpened
    | TrackerFailed
)


def event_as_dict(event: Event) -> dict[str, Any]:
    """The event as a JSON object whose `event` key names its kind."""
    values = {"event": type(event).__name__, **asdict(event)}
    if isinstance(event, StepDone):
        values["tokens_per_second"] = event.tokens_per_second
    return values


def event_from_dict(values: Mapping[str, object]) -> Event:
    """The event that `event_as_dict` gave as these values, as they are read back from JSON.

    Raises:
        KeyError, TypeError: they are those of no event.
    """
    kind: Any = {kind.__name__: kind for kind in get_args(Event)}[values["event"]]
    names = {field.name for field in fields(kind)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    event: Event = kind(**{name: value for name, value in given.items() if name in names})
    return event
