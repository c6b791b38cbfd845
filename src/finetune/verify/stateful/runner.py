"""Tells stories to a subject: a scratch folder, in which what nobody disturbs is done once."""

import json
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from finetune.files import write_text
from finetune.records import Outcome
from finetune.verify.check import LawFailure
from finetune.verify.models import build_model
from finetune.verify.stateful.checkpoints import StoreUnderTest
from finetune.verify.stateful.lives import RUNS, STORES, LifeClient, Task
from finetune.verify.stateful.stages import Stage
from finetune.verify.stateful.story import StoreStory, Story
from finetune.verify.stateful.training import TrainingLife, UndisturbedRun, undisturbed
from finetune.verify.subjects.subject import Subject
from finetune_strategies.recipes import EXTRA_RUNS, TaskRecipe


class World(Protocol):
    """What stages act on."""

    died: Counter[str]

    def check(self) -> None:
        """Hold the subject to what must be so at every moment."""
        ...

    def close(self) -> None:
        """Leave nothing."""
        ...


@dataclass(frozen=True, slots=True)
class StoryResult:
    """What came of a story.

    Attributes:
        failure: the law that failed and the evidence, at this stage, counted from 1.
        why: what was in the way, where no law was judged.
        idle: the stages that found nothing to act on.
        late: the stages whose death never came.
        died: how many processes really ended so, by the way.
    """

    outcome: Outcome
    failure: LawFailure | None = None
    stage: int = 0
    why: str = ""
    idle: tuple[int, ...] = ()
    late: tuple[int, ...] = ()
    died: tuple[tuple[str, int], ...] = ()


class ScenarioRunner:
    """A folder, for as long as it is open, in which a subject is told stories."""

    def __init__(self, subject: Subject) -> None:
        self.client = LifeClient(subject)
        self.folder = Path(tempfile.mkdtemp(prefix="finetune-stories-"))
        self._tasks: dict[str, Task] = {}
        self._wholes: dict[str, UndisturbedRun] = {}

    def close(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def open(self, story: Story) -> World:
        """The beginning of a story.

        Raises:
            LawFailure: not even an undisturbed run of the task comes to its end.
            EvidenceError: the subject refuses the task.
        """
        root = self._new()
        if isinstance(story, StoreStory):
            return StoreUnderTest(self.client, story.keep, root)
        return TrainingLife(self.client, self._task(story.task), self.whole(story.task), root)

    def whole(self, recipe: TaskRecipe) -> UndisturbedRun:
        """The task, done without any trouble."""
        key = recipe.model_dump_json()
        if key not in self._wholes:
            self._wholes[key] = undisturbed(self.client, self._task(recipe), self._new() / "whole")
        return self._wholes[key]

    def _task(self, recipe: TaskRecipe) -> Task:
        key = recipe.model_dump_json()
        if key not in self._tasks:
            self._tasks[key] = build_task(recipe, self._new() / "task")
        return self._tasks[key]

    def _new(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def run(self, story: Story, *, point: int = 0) -> StoryResult:
        """Do what the story says, stage by stage, until a law fails or it ends; the world is left empty.

        Args:
            point: the stage at which a law once failed: where it finds nothing to act on, nothing was judged.
        """
        if missing := self.client.lacks(STORES if isinstance(story, StoreStory) else RUNS):
            return StoryResult(Outcome.NOT_APPLICABLE, why=missing)
        number, idle, late, world = 0, list[int](), list[int](), None
        marks: dict[str, Any] = {}
        try:
            world = self.open(story)
            for number, stage in enumerate(story.stages, start=1):  # it is told when a stage raises
                before = world.died.total()
                if not perform(world, stage):
                    idle.append(number)
                elif getattr(stage, "death", None) is not None and world.died.total() == before:
                    late.append(number)
            marks = {"died": tuple(sorted(world.died.items()))}
        except LawFailure as failure:
            return StoryResult(Outcome.FAILED, failure, number, idle=tuple(idle), late=tuple(late))
        # Whatever else goes wrong, in the subject or in here, says nothing about a law.
        except Exception as error:
            return StoryResult(Outcome.ERROR, why=f"stage {number}: {type(error).__name__}: {error}", idle=tuple(idle))
        finally:
            if world is not None:
                world.close()
        marks |= {"idle": tuple(idle), "late": tuple(late)}
        if point in idle:
            why = f"stage {point}, at which the law failed, found nothing to act on: the law was not judged"
            return StoryResult(Outcome.ERROR, why=why, **marks)
        return StoryResult(Outcome.PASSED, **marks)

    def plain(self, words: str) -> str:
        """Words that do not depend on where this folder is."""
        return words.replace(str(self.folder), "...")


def build_task(recipe: TaskRecipe, folder: Path) -> Task:
    """Write a task's model and rows below a new folder; what a subject is to train with them."""
    build_model(recipe.model, folder / "model")
    rows = folder / "rows.jsonl"
    write_text(rows, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in recipe.rows))
    # What a run measures of the machine is no part of a case, and another one each time.
    return Task(folder / "model", rows, {**dict.fromkeys(EXTRA_RUNS, "never"), **recipe.settings})


def perform(world: World, stage: Stage) -> bool:
    """Do one stage, and hold the subject to what must be so at every moment; whether there was anything to do it to.

    Raises:
        LawFailure: a law does not hold.
    """
    if not stage.fits(world):
        return False
    stage.act(world)
    world.check()
    return True
