"""Trainers that lie: ours with one fault each, planted where a real trainer had it, in the processes that it starts."""

from pathlib import Path
from typing import Any, ClassVar

import finetune.run.checkpoints as checkpoints
import finetune.train as training
from finetune.backends.reference.session import ReferenceSession
from finetune.cli import main
from finetune.run.checkpoints import CheckpointStore
from finetune.verify.subjects.subject import About, InProcessSubject
from finetune.verify.trainers.ours_program import KEEPER, OurProgram, follow_orders


class FaultyTrainer(InProcessSubject):
    """Ours with the reference backend; a subclass says which program has the fault."""

    program: ClassVar = "finetune.cli:main"
    keeper: ClassVar = KEEPER

    def __init__(self) -> None:
        ours = OurProgram("reference", program=self.program, keeper=self.keeper)
        about = About(type(self).__name__, {"it": "1"}, dict.fromkeys(ours.handlers, ""))
        super().__init__(about, ours.handlers, [], ours.close)


def plant(owner: Any, name: str, fault: Any) -> None:
    """Put a fault in the place of what is right, for as long as this process lives; the fault is given what is."""
    right = getattr(owner, name)
    setattr(owner, name, lambda *given, **named: fault(right, *given, **named))


class ForgetsMoments(FaultyTrainer):
    """mlx-lm #97: resumes with the weights alone; the optimizer's averages begin anew."""

    program: ClassVar = "support.faulty_trainers:forget_moments"


def forget_moments() -> None:
    """`ft` with that fault."""

    def load(right: Any, session: ReferenceSession, folder: Path) -> None:
        right(session, folder)
        for tensor in (*session.optimizer.first.values(), *session.optimizer.second.values()):
            tensor[...] = 0

    plant(ReferenceSession, "load_state", load)
    main()


class ForgetsDice(FaultyTrainer):
    """transformers #35782: the random state is not restored, so that dropout draws other masks."""

    program: ClassVar = "support.faulty_trainers:forget_dice"


def forget_dice() -> None:
    """`ft` with that fault."""

    def load(right: Any, session: ReferenceSession, folder: Path) -> None:
        before = session._random.bit_generator.state
        right(session, folder)
        session._random.bit_generator.state = before

    plant(ReferenceSession, "load_state", load)
    main()


class ForgetsOrder(FaultyTrainer):
    """transformers #40691: a resumed run deals the rows out as in the first epoch."""

    program: ClassVar = "support.faulty_trainers:forget_order"


def forget_order() -> None:
    """`ft` with that fault."""

    def steps(right: Any, session: Any, batches_of: Any, *rest: Any, done_steps: int = 0) -> Any:
        dealt = (lambda epoch: batches_of(0)) if done_steps else batches_of
        return right(session, dealt, *rest, done_steps=done_steps)

    plant(training, "train", steps)
    main()


class GoesOnFromOlder(FaultyTrainer):
    """Goes on from the checkpoint before the newest."""

    program: ClassVar = "support.faulty_trainers:go_on_from_older"


def go_on_from_older() -> None:
    """`ft` with that fault."""
    plant(CheckpointStore, "newest", lambda right, store: ([None, *store.steps()][-2:] or [None])[0])
    main()


class ReportsTooEarly(FaultyTrainer):
    """transformers #29059: a checkpoint's folder has its name before its files are on the disk."""

    program: ClassVar = "support.faulty_trainers:report_too_early"


def report_too_early() -> None:
    """`ft` with that fault."""

    def write(right: Any, path: Path, fill: Any) -> None:
        path.mkdir(parents=True)
        fill(path)

    plant(checkpoints, "write_folder", write)
    main()


class RemovesFirst(FaultyTrainer):
    """Makes room for a new checkpoint by removing the old ones before the new one is there."""

    program: ClassVar = "support.faulty_trainers:remove_first"


def remove_first() -> None:
    """`ft` with that fault."""

    def save(right: Any, store: CheckpointStore, *given: Any, **named: Any) -> Path:
        for step in store.steps():
            checkpoints.remove_folder(store._path(step))
        path: Path = right(store, *given, **named)
        return path

    plant(CheckpointStore, "save", save)
    main()


class TrustsDamage(FaultyTrainer):
    """Loads whatever a checkpoint holds, without a look at its hashes."""

    program: ClassVar = "support.faulty_trainers:trust_damage"


def trust_damage() -> None:
    """`ft` with that fault."""
    plant(CheckpointStore, "open", lambda right, store, step, identity: store._path(step))
    main()


class SortsByName(FaultyTrainer):
    """accelerate #1463: takes step 9 for newer than step 10 when it removes the oldest."""

    keeper: ClassVar = "support.faulty_trainers:sort_by_name"


def sort_by_name() -> None:
    """The store's program with that fault."""
    plant(CheckpointStore, "steps", lambda right, store: sorted(right(store), key=str))
    follow_orders()


class LosesTheBest(FaultyTrainer):
    """Keeps the newest checkpoints only, whatever was the best."""

    keeper: ClassVar = "support.faulty_trainers:lose_the_best"


def lose_the_best() -> None:
    """The store's program with that fault."""

    def save(right: Any, store: CheckpointStore, *given: Any, best: int | None = None) -> Any:
        return right(store, *given, best=None)

    plant(CheckpointStore, "save", save)
    follow_orders()
