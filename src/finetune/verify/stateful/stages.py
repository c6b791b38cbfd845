"""The stages that a story is made of: each a frozen value, and the act that it stands for."""

import json
import shutil
from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from finetune.verify.check import check, check_same
from finetune.verify.stateful.checkpoints import StoreUnderTest
from finetune.verify.stateful.deaths import Death
from finetune.verify.stateful.lives import Order
from finetune.verify.stateful.training import REFUSED, TrainingLife, content, in_time, last_words, spoil
from finetune_strategies.recipes import Recipe

_LATEST = 100_000
Place = Annotated[int, Field(ge=-_LATEST, le=_LATEST)]
"""Where in a file something changes, from its beginning or, below zero, its end."""
Which = Annotated[int, Field(ge=0, le=1_000)]
Damage = Literal["flip", "cut"]


def _in_time(death: Death) -> Death:
    if not 0 <= death.after <= _LATEST:
        raise ValueError(f"a death after {death.after} changes; from 0 to {_LATEST:,}")
    return death


def _in_reach(order: Order) -> Order:
    if not 0 <= order.step <= 99_999_999 or not 0 <= (order.best or 0) <= 99_999_999:
        raise ValueError(f"a checkpoint of step {order.step}, best {order.best}; from 0 to 99,999,999")
    if len(order.content) > 2_000:
        raise ValueError(f"a checkpoint of {len(order.content):,} letters; at most 2,000")
    return order


Doom = Annotated[Death, AfterValidator(_in_time)]
Command = Annotated[Order, AfterValidator(_in_reach)]
Commands = Annotated[tuple[Command, ...], Field(min_length=1, max_length=50, strict=False)]


class Stage(Recipe, ABC):
    """One thing that is done to what a subject has made; `do` is its name in a story."""

    do: str
    acts_on: ClassVar[str] = ""
    """What of the world there must be for it; empty for nothing."""

    def fits(self, world: Any) -> bool:
        """Whether there is anything to do it to."""
        return not self.acts_on or bool(getattr(world, self.acts_on))

    @abstractmethod
    def act(self, world: Any) -> None:
        """Do it, and hold the subject to the laws of it.

        Raises:
            LawFailure: a law does not hold.
        """


OTHER_SETTINGS = {
    "training.learning_rate": 0.5,
    "training.seed": 1,
    "training.weight_decay": 0.1,
    "model.dtype": "bfloat16",
    "training.batch_size": 2,
}
"""Settings that change weights, each with a value that no task has."""


class TrainingStage(Stage):
    """Something that happens to a run: where it can go on and has checkpoints, unless a stage says otherwise."""

    acts_on = "resumable"


class Resume(TrainingStage):
    """Begin, or go on; to the end or to a death."""

    do: Literal["go on"] = "go on"
    acts_on = "unfinished"
    death: Doom | None = None

    def act(self, world: TrainingLife) -> None:
        """One process more."""
        world.go_on(self.death)


class Move(Stage):
    """The folder, of a run or of a store, is somewhere else from now on."""

    do: Literal["move"] = "move"
    acts_on = "begun"

    def act(self, world: TrainingLife | StoreUnderTest) -> None:
        """Rename it."""
        world.folder = world.folder.rename(world.root / f"{world.folder.name}-moved")


class AskForWhatCannotBe(TrainingStage):
    """Beginning twice, resuming what is finished or was never begun, measuring what is not finished: refused."""

    do: Literal["ask for what cannot be"] = "ask for what cannot be"
    acts_on = ""

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
            check(code == REFUSED, expected=refused_it, got=last_words(ending), law="refuse.what_cannot_be")
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
        check_same([world.newest], wrong, law="checkpoints.damage_found")
        world.refuses("resume.damaged", folder.name)
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
        world.refuses("resume.refuses_changed", self.key)
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
    acts_on = "finished"

    def act(self, world: TrainingLife) -> None:
        """It measures as one that nobody disturbed."""
        check_same(world.whole.measured(), world.measured(), law="measure.same")


class SpoilResult(TrainingStage):
    """A file of what was trained is damaged, and mended."""

    do: Literal["spoil result"] = "spoil result"
    acts_on = "finished"
    where: Place = 0
    which: Which = 0
    how: Damage = "flip"

    def act(self, world: TrainingLife) -> None:
        """What was trained is not used while it is damaged, and the file is named."""
        # A model card is for people, who may change it.
        saved = [each for each in world.look.names if each.startswith(("adapter/", "model/")) and "README" not in each]
        name = saved[self.which % len(saved)]
        old = (world.folder / name).read_bytes()
        spoil(world.folder / name, self.where, self.how)
        check_same((name,), world.look.damaged, law="result.damage_found")
        ending = in_time(world.subject.evaluate(world.folder))
        refused = ending.code == REFUSED and name.split("/")[-1] in ending.stderr
        check(refused, expected=f"code {REFUSED}, naming {name}", got=last_words(ending), law="measure.refuses_damaged")
        (world.folder / name).write_bytes(old)


class Work(Stage):
    """A process does as it is told, or dies before it has done it all."""

    do: Literal["work"] = "work"
    orders: Commands
    death: Doom | None = None

    def fits(self, world: StoreUnderTest) -> bool:
        """While what is saved is newer each time."""
        steps = [world.last, *(order.step for order in self.orders if order.do == "save")]
        return steps == sorted(set(steps))

    def act(self, world: StoreUnderTest) -> None:
        """One process more."""
        world.carry_out(self.orders, self.death)


class DamageCheckpoint(Stage):
    """A byte of one file changes, or its end is lost.

    `back` counts from the newest undamaged checkpoint, 0.
    """

    do: Literal["damage"] = "damage"
    acts_on = "whole"
    back: Which = 0
    where: Place = 0
    which: Which = 0
    how: Damage = "flip"

    def act(self, world: StoreUnderTest) -> None:
        """Damage it, and know what cannot be read any more."""
        step = world.whole[-1 - self.back % len(world.whole)]
        files = sorted(path for path in world.path(step).rglob("*") if path.is_file())
        file = files[self.which % len(files)]
        spoil(file, self.where, self.how)
        world.damaged.add(step)
        if file.parent == world.path(step) and file.suffix == ".json":
            world.unreadable.add(step)


class RemoveAsTold(Stage):
    """A damaged checkpoint is removed, as the hint says: what was before it goes on."""

    do: Literal["remove as told"] = "remove as told"
    acts_on = "damaged"
    which: Which = 0

    def act(self, world: StoreUnderTest) -> None:
        """Remove it."""
        step = sorted(world.damaged)[self.which % len(world.damaged)]
        shutil.rmtree(world.path(step))
        world.keep_only(set(world.there) - {step})


class OpenAllElsewhere(Stage):
    """A fresh process finds in each what was put there, and refuses what is damaged."""

    do: Literal["open all elsewhere"] = "open all elsewhere"
    acts_on = "there"

    def act(self, world: StoreUnderTest) -> None:
        """Open each, and one that never was."""
        steps = [*world.there, world.last + 1]
        ending = in_time(world.subject.obey(world.folder, world.keep, [Order("open", step) for step in steps]))
        check_same((0, 0), (ending.code, ending.changes), law="store.reads_only")
        for step, line in zip(steps, ending.answer.splitlines(), strict=True):
            world.check_opened(step, json.loads(line))
