"""Where stories are told to a subject: a scratch folder, in which what nobody disturbs is done once."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from finetune.verify.checkpoint_store import StoreUnderTest
from finetune.verify.laws import LawBrokenError
from finetune.verify.recipes import TaskRecipe
from finetune.verify.stages import Stage
from finetune.verify.stories import StageFinding, StoreScene, Story, TrainingScene
from finetune.verify.subjects import KeepsCheckpoints, ScenarioSubject, Task, Trains
from finetune.verify.training_life import TrainingLife, UndisturbedRun, undisturbed

Verdict = Literal["kept", "broken", "error", "not applicable"]
_ABILITIES: dict[type, type] = {TrainingScene: Trains, StoreScene: KeepsCheckpoints}


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

    `broken` has the law that broke, its stage and what was seen; of an `error`, which is nobody's broken law, and of a
    story that is `not applicable`, `why` says what was in the way. `idle` are the stages, counted from 1, that found
    nothing to act on, and `late` those whose death never came; `died` counts the processes that really ended so.
    """

    verdict: Verdict
    finding: StageFinding | None = None
    why: str = ""
    idle: tuple[int, ...] = ()
    late: tuple[int, ...] = ()
    died: tuple[tuple[str, int], ...] = ()


class _StoryProgress:
    """How far a story has been told, and which of its stages did not come to what they were meant for."""

    def __init__(self, story: Story) -> None:
        self.number = 0
        self.idle: list[int] = []
        self.late: list[int] = []
        self._story = story

    def take(self, world: World, stage: Stage) -> None:
        """Do the next stage."""
        self.number += 1
        before = world.died.total()
        if not perform(world, stage):
            self.idle.append(self.number)
        elif getattr(stage, "death", None) is not None and world.died.total() == before:
            self.late.append(self.number)

    def outcome(self, world: World) -> StoryResult:
        """What came of it when no law broke."""
        broken = self._story.broken
        marks: Any = {"idle": tuple(self.idle), "late": tuple(self.late), "died": tuple(sorted(world.died.items()))}
        if broken is not None and broken.stage in self.idle:
            why = f"stage {broken.stage}, at which the law broke, found nothing to act on: the law was not judged"
            return StoryResult("error", why=why, **marks)
        return StoryResult("kept", **marks)


class ScenarioRunner:
    """A folder, for as long as it is open, in which a subject is told stories."""

    def __init__(self, subject: ScenarioSubject) -> None:
        self.subject = subject
        self.folder = Path(tempfile.mkdtemp(prefix="finetune-theatre-"))
        self._tasks: dict[str, Task] = {}
        self._wholes: dict[str, UndisturbedRun] = {}

    def close(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def open(self, setting: TrainingScene | StoreScene) -> World:
        """The beginning of a story.

        Raises:
            LawBrokenError: not even an undisturbed run of the task comes to its end.
            EvidenceError: the subject refuses the task.
        """
        subject, root = self.subject, Path(tempfile.mkdtemp(dir=self.folder))
        if isinstance(setting, StoreScene):
            assert isinstance(subject, KeepsCheckpoints)
            return StoreUnderTest(subject, setting.keep, root)
        assert isinstance(subject, Trains)
        return TrainingLife(subject, self._task(setting.task), self.whole(setting.task), root)

    def whole(self, recipe: TaskRecipe) -> UndisturbedRun:
        """The task, done without any trouble."""
        key = recipe.model_dump_json()
        if key not in self._wholes:
            assert isinstance(self.subject, Trains)
            folder = Path(tempfile.mkdtemp(dir=self.folder)) / "whole"
            self._wholes[key] = undisturbed(self.subject, self._task(recipe), folder)
        return self._wholes[key]

    def _task(self, recipe: TaskRecipe) -> Task:
        key = recipe.model_dump_json()
        if key not in self._tasks:
            self._tasks[key] = recipe.build(Path(tempfile.mkdtemp(dir=self.folder)) / "task")
        return self._tasks[key]

    def run(self, story: Story) -> StoryResult:
        """Do what the story says, stage by stage, until a law breaks or it ends; the world is left empty."""
        missing = lacking(self.subject, story)
        if missing:
            return StoryResult("not applicable", why=f"{self.subject.name} lacks an ability: {', '.join(missing)}")
        told = _StoryProgress(story)
        try:
            with self._opened(story) as world:
                for stage in story.stages:
                    told.take(world, stage)
                return told.outcome(world)
        except LawBrokenError as broken:
            return StoryResult(
                "broken", self.finding(broken, told.number), idle=tuple(told.idle), late=tuple(told.late)
            )
        # Whatever else goes wrong, in the subject's door or in here, says nothing about a law.
        except Exception as error:
            return StoryResult(
                "error", why=f"stage {told.number}: {type(error).__name__}: {error}", idle=tuple(told.idle)
            )

    def finding(self, broken: LawBrokenError, stage: int) -> StageFinding:
        """A broken law at a stage, in words that do not depend on where this folder is."""
        expected, got = (words.replace(str(self.folder), "...") for words in (broken.expected, broken.got))
        law = broken.law
        return StageFinding(law=law.id, statement=law.statement, stage=stage, expected=expected, got=got)

    @contextmanager
    def _opened(self, story: Story) -> Iterator[World]:
        world = self.open(story.setting)
        try:
            yield world
        finally:
            world.close()


def perform(world: World, stage: Stage) -> bool:
    """Do one stage, and hold the subject to what must be so at every moment; whether there was anything to do it to.

    Raises:
        LawBrokenError: a law does not hold.
    """
    if not stage.fits(world):
        return False
    stage.act(world)
    world.check()
    return True


def lacking(subject: ScenarioSubject, story: Story) -> list[str]:
    """The abilities that the story needs and the subject has not."""
    needed = [_ABILITIES[type(story.setting)], *(stage.needs for stage in story.stages if stage.needs is not None)]
    return sorted({ability.__name__ for ability in needed if not isinstance(subject, ability)})


def run_story(story: Story, subject: ScenarioSubject) -> StoryResult:
    """Tell one story to a subject."""
    theatre = ScenarioRunner(subject)
    try:
        return theatre.run(story)
    finally:
        theatre.close()
