"""A story: what is there at the beginning and what is done, stage by stage; the case of a stateful law."""

from typing import Annotated, Literal

from pydantic import Field

from finetune.verify.stateful.stages import (
    AskForWhatCannotBe,
    DamageCheckpoint,
    Measure,
    Move,
    OpenAllElsewhere,
    RemoveAsTold,
    Resume,
    ResumeAsAnother,
    SaveInAnotherRhythm,
    SpoilCheckpoint,
    SpoilResult,
    Work,
)
from finetune_strategies.recipes import Recipe, TaskRecipe

MOST_STAGES = 200
RunStage = Annotated[
    Resume
    | Move
    | AskForWhatCannotBe
    | SpoilCheckpoint
    | ResumeAsAnother
    | SaveInAnotherRhythm
    | Measure
    | SpoilResult,
    Field(discriminator="do"),
]
StoreStage = Annotated[Work | Move | DamageCheckpoint | RemoveAsTold | OpenAllElsewhere, Field(discriminator="do")]


class RunStory(Recipe):
    """What is done to a run of a task."""

    scene: Literal["training"] = "training"
    task: TaskRecipe
    stages: Annotated[tuple[RunStage, ...], Field(max_length=MOST_STAGES, strict=False)] = ()


class StoreStory(Recipe):
    """What is done to a store that keeps so many of the newest checkpoints."""

    scene: Literal["checkpoints"] = "checkpoints"
    keep: Annotated[int, Field(ge=1, le=20)] = 1
    stages: Annotated[tuple[StoreStage, ...], Field(max_length=MOST_STAGES, strict=False)] = ()


Story = RunStory | StoreStory
