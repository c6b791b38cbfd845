"""What can happen to a store of checkpoints: orders and deaths, moves, damage, removal, being read elsewhere."""

import json
import shutil
from typing import ClassVar, Literal

from finetune.verify.checkpoint_store import StoreUnderTest
from finetune.verify.laws import check_law_same
from finetune.verify.stages import Commands, Damage, Doom, Place, Stage, Which
from finetune.verify.subjects import Order
from finetune.verify.training_life import in_time, spoil


class StoreStage(Stage):
    """Something that happens to a store."""

    scene: ClassVar = "checkpoints"


class Work(StoreStage):
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


class MoveStore(StoreStage):
    """The folder is somewhere else from now on."""

    do: Literal["move"] = "move"

    def fits(self, world: StoreUnderTest) -> bool:
        """Once there is one."""
        return world.folder.exists()

    def act(self, world: StoreUnderTest) -> None:
        """Rename it."""
        world.folder = world.folder.rename(world.root / f"{world.folder.name}-moved")


class DamageCheckpoint(StoreStage):
    """A byte of one file changes, or its end is lost.

    `back` counts from the newest undamaged checkpoint, 0.
    """

    do: Literal["damage"] = "damage"
    back: Which = 0
    where: Place = 0
    which: Which = 0
    how: Damage = "flip"

    def fits(self, world: StoreUnderTest) -> bool:
        """While anything is undamaged."""
        return bool(world.whole)

    def act(self, world: StoreUnderTest) -> None:
        """Damage it, and know what cannot be read any more."""
        step = world.whole[-1 - self.back % len(world.whole)]
        files = sorted(path for path in world.path(step).rglob("*") if path.is_file())
        file = files[self.which % len(files)]
        spoil(file, self.where, self.how)
        world.damaged.add(step)
        if file.parent == world.path(step) and file.suffix == ".json":
            world.unreadable.add(step)


class RemoveAsTold(StoreStage):
    """A damaged checkpoint is removed, as the hint says: what was before it goes on."""

    do: Literal["remove as told"] = "remove as told"
    which: Which = 0

    def fits(self, world: StoreUnderTest) -> bool:
        """While anything is damaged."""
        return bool(world.damaged)

    def act(self, world: StoreUnderTest) -> None:
        """Remove it."""
        step = sorted(world.damaged)[self.which % len(world.damaged)]
        shutil.rmtree(world.path(step))
        world.keep_only(set(world.there) - {step})


class OpenAllElsewhere(StoreStage):
    """A fresh process finds in each what was put there, and refuses what is damaged."""

    do: Literal["open all elsewhere"] = "open all elsewhere"

    def fits(self, world: StoreUnderTest) -> bool:
        """While anything is there."""
        return bool(world.there)

    def act(self, world: StoreUnderTest) -> None:
        """Open each, and one that never was."""
        steps = [*world.there, world.last + 1]
        ending = in_time(world.subject.obey(world.folder, world.keep, [Order("open", step) for step in steps]))
        check_law_same("store.reads-only", (0, 0), (ending.code, ending.changes))
        for step, line in zip(steps, ending.answer.splitlines(), strict=True):
            world.check_opened(step, json.loads(line))
