"""What a training run tells while it goes; progress bar, log, checkpoints and report listen."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run began: when (ISO 8601, UTC), and the command that repeats it."""

    started: str
    command: str


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
    """Loss on rows that are never trained on, in nats per token, token-weighted, dropout off."""

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
class FirstGradients:
    """The L2 norm of every trainable tensor's gradient at step 1, before any weight has changed."""

    norms: dict[str, float]


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A complete checkpoint lies at `path`."""

    step: int
    path: str


@dataclass(frozen=True, slots=True)
class PhaseStarted:
    """The run turned to something new; `note` says why or how large."""

    phase: str
    note: str = ""


Event = RunStarted | StepDone | HeldOutLoss | FixedLoss | FirstGradients | CheckpointSaved | PhaseStarted


def event_as_dict(event: Event) -> dict[str, Any]:
    """The event as a JSON object whose `event` key names its kind."""
    values = {"event": type(event).__name__, **asdict(event)}
    if isinstance(event, StepDone):
        values["tokens_per_second"] = event.tokens_per_second
    return values
