"""What the state machines share: a runner for each subject, tasks, deaths, and how a failing story is kept."""

import atexit
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine

from finetune.verify.catalogue import catalogue
from finetune.verify.check import LawFailure
from finetune.verify.findings import Finding, write_finding
from finetune.verify.stateful.deaths import CODES, Death
from finetune.verify.stateful.runner import ScenarioRunner, perform
from finetune.verify.stateful.stages import Stage
from finetune.verify.stateful.story import RunStory, Story
from finetune.verify.subjects.choose import BACKENDS, running_subject
from finetune.verify.trainers.ours import inside
from finetune_strategies.recipes import TaskRecipe

QUICK_TASK: Mapping[str, Any] = {
    "template.name": "chatml",
    "tokens.max_length": 128,
    "training.epochs": 2.0,
    "training.batch_size": 3,
    "training.learning_rate": 0.01,
    "training.save_every": 2,
    "evaluation.max_new_tokens": 3,
}
ADAPTER = {"adapter.rank": 2, "adapter.dropout": 0.2}
TASKS: dict[str, Mapping[str, Any]] = {
    "plain": ADAPTER,
    "accumulating": ADAPTER
    | {"training.gradient_accumulation_steps": 2, "training.epochs": 3.0, "training.save_every": 1},
    "keeping the best": ADAPTER
    | {
        "data.valid_fraction": 0.3,
        "training.load_best_model": True,
        "training.evaluate_every": 1,
        "training.save_every": 3,
        "training.learning_rate": 0.1,
        "training.early_stopping_patience": 4,
        "training.epochs": 3.0,
    },
    "packing": ADAPTER | {"training.packing": True, "training.epochs": 3.0},
    "whole model": {"adapter.kind": "full", "training.epochs": 1.0, "training.save_every": 1},
}
"""What differs from the quick task: each has another way through training, saving and resuming."""
ROWS = tuple({"prompt": f"say {'word ' * (4 * index % 15)}", "completion": f"{index}"} for index in range(11))
"""Of very unequal lengths."""
KEPT = Path(".hypothesis/findings")
"""Where the findings of failing machines lie."""


@cache
def runner(name: str) -> ScenarioRunner:
    """What tells a subject stories, for this session; our own is asked in this process."""
    folder = Path(tempfile.mkdtemp(prefix="finetune-subject-"))
    if name in BACKENDS:
        subject = inside(name, folder)
        atexit.register(subject.close)
    else:
        opened = running_subject(name, folder)
        subject = opened.__enter__()
        atexit.register(opened.__exit__, None, None, None)
    told = ScenarioRunner(subject)
    atexit.register(told.close)
    return told


def training(name: str, rows: int = len(ROWS)) -> RunStory:
    """The beginning of a run of a task: a tiny random model and a few rows."""
    return RunStory(task=TaskRecipe(rows=ROWS[:rows], settings={**QUICK_TASK, **TASKS[name]}))


class Storyteller(RuleBasedStateMachine):
    """A machine that draws stages, does them, and keeps the story in which a law failed."""

    subject: ClassVar = "reference"

    def begin_in(self, story: Story) -> None:
        """Nothing has been done yet."""
        self.story = story
        self.stages: list[Stage] = []
        try:
            self.world: Any = runner(self.subject).open(story)
        except LawFailure as failure:
            self.keep(failure)
            raise

    @property
    def begun(self) -> bool:
        """Whether there is anything to act on."""
        return hasattr(self, "world")

    def do(self, stage: Stage) -> None:
        """Do one stage, as whoever replays the story will."""
        self.stages.append(stage)
        try:
            perform(self.world, stage)
        except LawFailure as failure:
            self.keep(failure)
            raise

    def keep(self, failure: LawFailure) -> None:
        """Write down what was done, and how to do it again; of a failing test's stories the smallest comes last."""
        plain = runner(self.subject).plain
        finding = Finding(
            law=catalogue()[failure.law],
            case=self.story.model_copy(update={"stages": tuple(self.stages)}),
            subject=self.subject,
            expected=plain(failure.expected),
            got=plain(failure.got),
            stage=len(self.stages),
            versions={"python": python_version(), "hypothesis": version("hypothesis")},
        )
        path = KEPT / f"{type(self).__name__}-{failure.law}.json"
        write_finding(finding, path)
        failure.add_note(f"replay: ft replay {path}")

    def teardown(self) -> None:
        """Leave nothing."""
        if self.begun:
            self.world.close()


def deaths(changes: int, *ways: str) -> st.SearchStrategy[Death]:
    """These ways to die, or all, at any of so many changes to the disk, often one of the first; some come too late."""
    return st.builds(Death, st.integers(0, 8) | st.integers(0, changes), st.sampled_from(ways or sorted(CODES)))
