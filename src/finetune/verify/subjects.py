"""The door through which the suite sees a trainer: what it is asked, how that ended, and what then lies on disk.

Each ability is a protocol of its own; a subject has it by having its methods, and what it lacks is not asked of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from finetune.verify.deaths import Death


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be trained: a base model's folder, a file of rows, and settings by the names that `ft schema` has."""

    model: Path
    data: Path
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process ended.

    `code` is its exit code, negative for the signal that killed it; `answer` what it printed as data and `stderr` all
    else it said; `changes` counts what it changed in its folder, None when it did not live to say so.
    """

    code: int
    answer: str
    stderr: str
    changes: int | None


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """What lies in a run's folder, without what a clock, a process id or a random name is to blame for.

    Attributes:
        begun: there is something to go on with.
        finished: the run says that it is whole.
        checkpoints: each that is listed as complete, with what is wrong with it: "" for nothing.
        course: what the run's log tells of training, in order.
        resumed: after which steps the run went on when it was resumed, in order.
        files: everything that two runs of the same task must have alike, with a hash of its content.
        names: every file there is.
        record: what a finished run says of itself.
        damaged: the files of a finished run that are not what it says they are.
    """

    begun: bool
    finished: bool
    checkpoints: Mapping[int, str]
    course: tuple[Mapping[str, Any], ...]
    resumed: tuple[int, ...]
    files: Mapping[str, str]
    names: tuple[str, ...]
    record: Mapping[str, Any] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()


class ScenarioSubject(Protocol):
    """A trainer, by its name."""

    @property
    def name(self) -> str:
        """What it is called in reports."""
        ...


@runtime_checkable
class Trains(ScenarioSubject, Protocol):
    """It trains, goes on with a run that ended before its time, and measures a finished one again.

    Each runs in a process of its own, which dies as it is told to. No trouble of the trainer's raises here: it is in
    the ending.
    """

    def train(self, task: Task, folder: Path, death: Death | None = None) -> Ending:
        """Begin a run in a folder."""
        ...

    def resume(self, folder: Path, death: Death | None = None) -> Ending:
        """Go on with the run in a folder."""
        ...

    def change(self, folder: Path, key: str, value: Any) -> None:
        """Change a setting of a run that is to be gone on with, as its user could."""
        ...

    def evaluate(self, folder: Path) -> Ending:
        """Measure the base and the tuned model of a finished run again."""
        ...

    def look(self, folder: Path) -> RunSnapshot:
        """See what lies there; nothing is changed."""
        ...


@runtime_checkable
class Exports(Trains, Protocol):
    """It hands on what a finished run has trained: as a model folder, and as GGUF; and compares what it handed on.

    As with `Trains`, each runs in a process of its own, and no trouble raises here.
    """

    def merge(self, folder: Path, death: Death | None = None) -> Ending:
        """Fold the adapter of the run in a folder into its base, as a model folder below the run's."""
        ...

    def take_off(self, folder: Path) -> Ending:
        """Fold the adapter in, take it off again, and say what is left.

        Its answer is an object of JSON: whether the model's weights are `kept` byte for byte, whether it is the `base`
        again in every logit, and whether it was `another` with the adapter on.
        """
        ...

    def export(
        self, source: Path, outtype: str, *, output: Path | None = None, alone: bool = False, death: Death | None = None
    ) -> Ending:
        """Write a run, or a model folder, as GGUF; where no output is named, below the run. `alone`: the adapter only.

        Changes are counted in the folder of the output, or of the run.
        """
        ...

    def compare(self, folder: Path, through: Sequence[str], death: Death | None = None) -> Ending:
        """Hold what was handed on to the run; its answer is what `equivalence.json` holds."""
        ...


@dataclass(frozen=True, slots=True)
class Order:
    """One thing to do with a store of checkpoints: save a step with this content, open one, or let go of the opened."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}

    do: Literal["save", "open", "release"]
    step: int = 0
    content: str = ""
    best: int | None = None


@runtime_checkable
class KeepsCheckpoints(ScenarioSubject, Protocol):
    """It keeps checkpoints of anything, the newest few and the best."""

    def obey(self, folder: Path, keep: int, orders: Sequence[Order], death: Death | None = None) -> Ending:
        """Do so in one process; its answer has a line of JSON for each order that was done.

        The line is null, for an opened one the content that was found, or what was refused as `{"refused": words}`.
        """
        ...

    def listed(self, folder: Path) -> Mapping[int, str]:
        """Each checkpoint that is listed as complete, with what is wrong with it: "" for nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Serving:
    """What is to be served: a GGUF file, the template of its server's kind, and where answers stop."""

    file: Path
    template: str
    stops: tuple[str, ...]


@runtime_checkable
class Deploys(ScenarioSubject, Protocol):
    """It gives names on a server to models, asks them, and removes them.

    No trouble of the server's raises here: it is in the ending, whose `stderr` says what then is what.
    """

    def deploy(self, name: str, serving: Serving, *, replace: bool = False) -> Ending:
        """Let a name mean this model; what bore it before gives way only where that is said."""
        ...

    def answer(self, name: str, question: str) -> Ending:
        """What a name's model says."""
        ...

    def remove(self, name: str) -> Ending:
        """Let a name mean nothing any more."""
        ...

    def served(self) -> Mapping[str, str]:
        """Each name that means a model, with a mark of all that it is."""
        ...
