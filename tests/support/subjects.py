"""What the scenario machines share: the theatre in which they tell stories, tasks, deaths, and how a story is kept."""

import atexit
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine

from finetune.verify.choose import opened_subject
from finetune.verify.deaths import CODES, Death
from finetune.verify.laws import LawBrokenError
from finetune.verify.recipes import TaskRecipe
from finetune.verify.stages import Stage
from finetune.verify.stories import StoreScene, Story, TrainingScene, origin_of, save_story
from finetune.verify.theatre import ScenarioRunner, perform

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
    "accumulating": ADAPTER | {"training.accumulation": 2, "training.epochs": 3.0, "training.save_every": 1},
    "keeping the best": ADAPTER
    | {
        "data.valid_fraction": 0.3,
        "training.keep": "best",
        "training.evaluate_every": 1,
        "training.save_every": 3,
        "training.learning_rate": 0.1,
        "training.stop_after": 4,
        "training.epochs": 3.0,
    },
    "packing": ADAPTER | {"training.packing": True, "training.epochs": 3.0},
    "whole model": {"adapter.kind": "full", "training.epochs": 1.0, "training.save_every": 1},
}
"""What differs from the quick task: each has another way through training, saving and resuming."""
ROWS = tuple({"prompt": f"say {'word ' * (4 * index % 15)}", "completion": f"{index}"} for index in range(11))
"""Of very unequal lengths."""
KEPT = Path(".hypothesis/stories")
"""Where the stories of failing machines lie."""


@cache
def theatre(name: str) -> ScenarioRunner:
    """A subject's theatre, for this session."""
    subject = opened_subject(name)
    opened = ScenarioRunner(subject.__enter__())
    atexit.register(subject.__exit__, None, None, None)
    atexit.register(opened.close)
    return opened


def training(name: str) -> TrainingScene:
    """The beginning of a run of a task: a tiny random model and a few rows."""
    return TrainingScene(task=TaskRecipe(rows=ROWS, settings={**QUICK_TASK, **TASKS[name]}))


class Storyteller(RuleBasedStateMachine):
    """A machine that draws stages, does them, and keeps the story in which a law broke."""

    subject: ClassVar = "reference"

    def begin_in(self, setting: TrainingScene | StoreScene) -> None:
        """Nothing has been done yet."""
        self.setting = setting
        self.stages: list[Stage] = []
        try:
            self.world: Any = theatre(self.subject).open(setting)
        except LawBrokenError as broken:
            self.keep(broken)
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
        except LawBrokenError as broken:
            self.keep(broken)
            raise

    def keep(self, broken: LawBrokenError) -> None:
        """Write down what was done, and how to do it again; of a failing test's stories the smallest comes last."""
        seed = str(getattr(type(self), "_hypothesis_internal_use_seed", None) or "")
        story = Story(
            setting=self.setting,
            stages=tuple(self.stages),
            broken=theatre(self.subject).finding(broken, len(self.stages)),
            origin=origin_of(self.subject, seed),
        )
        path = KEPT / f"{type(self).__name__}-{broken.law.id}.json"
        save_story(story, path)
        broken.add_note(f"replay: ft replay {path}")

    def teardown(self) -> None:
        """Leave nothing."""
        if self.begun:
            self.world.close()


def deaths(changes: int, *ways: str) -> st.SearchStrategy[Death]:
    """These ways to die, or all, at any of so many changes to the disk, often one of the first; some come too late."""
    return st.builds(Death, st.integers(0, 8) | st.integers(0, changes), st.sampled_from(ways or sorted(CODES)))
