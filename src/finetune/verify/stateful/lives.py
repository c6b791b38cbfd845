"""A trainer's processes as stateful laws see them: what they are asked, how each ended, and what then lies on disk.

A subject has two more abilities for them. `run_process` trains, resumes or evaluates in a process of its own, which
dies as it is told to; `look` and `change_setting` go with it. `store_process` does orders with a store of checkpoints
likewise, and `list_checkpoints` goes with that. No trouble of the trainer's raises: it is in the ending.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from finetune.verify.stateful.deaths import Death
from finetune.verify.subjects.subject import Subject

RUNS = ("run_process", "look", "change_setting")
"""The abilities that a story of a run needs."""
STORES = ("store_process", "list_checkpoints")
"""Those that a story of a store needs."""


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


@dataclass(frozen=True, slots=True)
class Order:
    """One thing to do with a store of checkpoints: save a step with this content, open one, or let go of the opened."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}

    do: Literal["save", "open", "release"]
    step: int = 0
    content: str = ""
    best: int | None = None


class LifeClient:
    """Asks a subject for processes, and gives values back."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.name = subject.about.name

    def lacks(self, needed: Sequence[str]) -> str:
        """Which of these abilities are missing, and why; empty where none is."""
        return self.subject.about.lacks(needed)

    def train(self, task: Task, folder: Path, death: Death | None = None) -> Ending:
        """Begin a run in a folder."""
        whole = {"model": str(task.model), "data": str(task.data), "settings": dict(task.settings)}
        return self._process("run_process", folder, death, do="train", task=whole)

    def resume(self, folder: Path, death: Death | None = None) -> Ending:
        """Go on with the run in a folder."""
        return self._process("run_process", folder, death, do="resume")

    def evaluate(self, folder: Path) -> Ending:
        """Measure the base and the tuned model of a finished run again."""
        return self._process("run_process", folder, None, do="evaluate")

    def change(self, folder: Path, key: str, value: object) -> None:
        """Change a setting of a run that is to be gone on with, as its user could."""
        self.subject.ask("change_setting", {"folder": str(folder), "key": key, "value": value})

    def look(self, folder: Path) -> RunSnapshot:
        """See what lies there; nothing is changed."""
        found = dict(self.subject.ask("look", {"folder": str(folder)}))
        found["checkpoints"] = {int(step): words for step, words in found["checkpoints"].items()}
        lists = {key: tuple(found[key]) for key in ("course", "resumed", "names", "damaged")}
        return RunSnapshot(**{**found, **lists})

    def obey(self, folder: Path, keep: int, orders: Sequence[Order], death: Death | None = None) -> Ending:
        """Do orders in one process; its answer has a line of JSON for each that was done.

        The line is null, for an opened one the content that was found, or what was refused as `{"refused": words}`.
        """
        given = [asdict(order) for order in orders]
        return self._process("store_process", folder, death, keep=keep, orders=given)

    def listed(self, folder: Path) -> Mapping[int, str]:
        """Each checkpoint that is listed as complete, with what is wrong with it: "" for nothing."""
        found = self.subject.ask("list_checkpoints", {"folder": str(folder)})
        return {int(step): words for step, words in found["checkpoints"].items()}

    def _process(self, ability: str, folder: Path, death: Death | None, **given: object) -> Ending:
        given |= {"folder": str(folder), "death": asdict(death) if death else None}
        return Ending(**self.subject.ask(ability, given))
