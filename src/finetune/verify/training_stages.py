"""What can happen to a run: deaths, moves, damage, requests that cannot be, other settings, measuring."""

import shutil
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune.verify.laws import check_law, check_law_same
from finetune.verify.stages import Damage, Doom, Place, Stage, Which
from finetune.verify.training_life import REFUSED, TrainingLife, content, in_time, spoil, told_of

OTHER_SETTINGS = {
    "training.learning_rate": 0.5,
    "training.seed": 1,
    "training.weight_decay": 0.1,
    "model.dtype": "bfloat16",
    "training.batch_size": 2,
}
"""Settings that change weights, each with a value that no task has."""


class TrainingStage(Stage):
    """Something that happens to a run."""

    scene: ClassVar = "training"

    def fits(self, world: TrainingLife) -> bool:
        """Whether there is a run to go on with that has checkpoints, unless a stage says otherwise."""
        return world.resumable


class Resume(TrainingStage):
    """Begin, or go on; to the end or to a death."""

    do: Literal["go on"] = "go on"
    death: Doom | None = None

    def fits(self, world: TrainingLife) -> bool:
        """While anything is left to do."""
        return not world.look.finished

    def act(self, world: TrainingLife) -> None:
        """One process more."""
        world.resume(self.death)


class Move(TrainingStage):
    """The folder is somewhere else from now on."""

    do: Literal["move"] = "move"

    def fits(self, world: TrainingLife) -> bool:
        """Once there is one."""
        return world.folder.exists()

    def act(self, world: TrainingLife) -> None:
        """Rename it."""
        world.folder = world.folder.rename(world.root / f"{world.folder.name}-moved")


class AskForWhatCannotBe(TrainingStage):
    """Beginning twice, resuming what is finished or was never begun, measuring what is not finished: refused."""

    do: Literal["ask for what cannot be"] = "ask for what cannot be"

    def fits(self, world: TrainingLife) -> bool:
        """Always."""
        return True

    def act(self, world: TrainingLife) -> None:
        """Ask for each, and find all as it was."""
        look, before = world.look, content(world.folder)
        refused = {}
        if look.begun:
            refused["begin again"] = world.subject.train(world.task, world.folder)
        if look.finished or not look.begun:
            refused["resume"] = world.subject.resume(world.folder)
        if not look.finished:
            refused["measure"] = world.subject.evaluate(world.folder)
        for what, ending in refused.items():
            code = in_time(ending).code
            refused_it = f"{what}: code {REFUSED}"
            check_law("refuse.what-cannot-be", code == REFUSED, expected=refused_it, got=told_of(ending))
            world.unchanged(before, ending)


class SpoilCheckpoint(TrainingStage):
    """A file of the newest checkpoint is damaged; then it is mended, or the checkpoint removed as the hint says."""

    do: Literal["spoil checkpoint"] = "spoil checkpoint"
    where: Place = 0
    which: Which = 0
    how: Damage = "flip"
    mend: bool = False

    def act(self, world: TrainingLife) -> None:
        """It is refused by name and nothing is touched; afterwards the run can go on."""
        [folder] = world.folder.rglob(f"step-{world.newest:08d}")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        file = files[self.which % len(files)]
        old = file.read_bytes()
        spoil(file, self.where, self.how)
        wrong = [step for step, words in world.look.checkpoints.items() if words]
        check_law_same("checkpoints.damage-found", [world.newest], wrong)
        world.refuses("resume.refuses-damaged", folder.name)
        if self.mend:
            file.write_bytes(old)
        else:
            shutil.rmtree(folder)
            world.newest = max(world.look.checkpoints, default=0)


class ResumeAsAnother(TrainingStage):
    """With a setting changed that changes weights, going on is refused by its name."""

    do: Literal["resume as another"] = "resume as another"
    key: Literal[
        "model.dtype", "training.batch_size", "training.learning_rate", "training.seed", "training.weight_decay"
    ] = "training.seed"

    def act(self, world: TrainingLife) -> None:
        """Change it, ask, and put all back."""
        kept = world.root / "kept"
        shutil.copytree(world.folder, kept)
        world.subject.change(world.folder, self.key, OTHER_SETTINGS[self.key])
        world.refuses("resume.refuses-changed", self.key)
        shutil.rmtree(world.folder)
        kept.rename(world.folder)


class SaveInAnotherRhythm(TrainingStage):
    """How often is saved may change; the weights do not."""

    do: Literal["save in another rhythm"] = "save in another rhythm"
    rhythm: Annotated[int, Field(ge=1, le=1_000)] = 1

    def act(self, world: TrainingLife) -> None:
        """Change it."""
        world.subject.change(world.folder, "training.save_every", self.rhythm)
        world.same_plan = False


class Measure(TrainingStage):
    """A finished run is measured again."""

    do: Literal["measure"] = "measure"

    def fits(self, world: TrainingLife) -> bool:
        """Once it is finished."""
        return world.look.finished

    def act(self, world: TrainingLife) -> None:
        """It measures as one that nobody disturbed."""
        check_law_same("measure.same", world.whole.measured(), world.measured())


class SpoilResult(TrainingStage):
    """A file of what was trained is damaged, and mended."""

    do: Literal["spoil result"] = "spoil result"
    where: Place = 0
    which: Which = 0
    how: Damage = "flip"

    def fits(self, world: TrainingLife) -> bool:
        """Once it is finished."""
        return world.look.finished

    def act(self, world: TrainingLife) -> None:
        """What was trained is not used while it is damaged, and the file is named."""
        # A model card is for people, who may change it.
        saved = [each for each in world.look.names if each.startswith(("adapter/", "model/")) and "README" not in each]
        name = saved[self.which % len(saved)]
        old = (world.folder / name).read_bytes()
        spoil(world.folder / name, self.where, self.how)
        check_law_same("result.damage-found", (name,), world.look.damaged)
        ending = in_time(world.subject.evaluate(world.folder))
        refused = ending.code == REFUSED and name.split("/")[-1] in ending.stderr
        check_law("measure.refuses-damaged", refused, expected=f"code {REFUSED}, naming {name}", got=told_of(ending))
        (world.folder / name).write_bytes(old)
