"""Faults of resuming, of checkpoints, and of files on the disk."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from weakref import WeakSet

import finetune.train as training
from finetune import files as write
from finetune.events import Event
from finetune.ports import Session
from finetune.records import Batch
from finetune.run import checkpoints
from finetune.run.checkpoints import CheckpointStore
from finetune.run.folder import RunFolder
from finetune.training import loop
from finetune.training.early_stopping import EarlyStopping
from finetune.training.loop import Batching, LoopPlan
from finetune.verify.faults.fault import fault, plant
from finetune.verify.faults.sessions import forget_moments, forget_steps, plant_session

Stepping = Callable[..., Iterator[Event]]


def _when_resumed(dealt: Callable[[Batching, LoopPlan, int], Batching]) -> None:
    """Deal out other rows in a run that is gone on with: `dealt` is given what is right, the plan and the steps."""

    def steps(
        right: Stepping,
        session: Session,
        batches_of: Batching,
        held_out: Sequence[Batch],
        plan: LoopPlan,
        *,
        done_steps: int = 0,
    ) -> Iterator[Event]:
        wrong = dealt(batches_of, plan, done_steps) if done_steps else batches_of
        return right(session, wrong, held_out, plan, done_steps=done_steps)

    plant(training, "train", steps)


def _each(batches_of: Batching, plan: LoopPlan) -> int:
    """How many steps an epoch has."""
    count: int = math.ceil(len(batches_of(0)) / plan.gradient_accumulation_steps)
    return count


@fault(
    "A160",
    "resume.epoch0_order",
    real="transformers #8878, #40691",
    what="A resumed run deals the rows out as in the first epoch.",
)
def first_order_again() -> None:
    """The sampler is made anew."""
    _when_resumed(lambda batches_of, plan, done: lambda epoch: batches_of(0))


@fault(
    "A162",
    "resume.skip_in_wrong_unit",
    real="transformers #5605",
    what="A resumed run skips as many batches as steps were done.",
)
def skips_too_few() -> None:
    """Batches of the epoch are learned from a second time."""

    def dealt(batches_of: Batching, plan: LoopPlan, done: int) -> Batching:
        at, into = divmod(done, _each(batches_of, plan))

        def wrong(epoch: int) -> list[Batch]:
            batches = batches_of(epoch)
            start = into * plan.gradient_accumulation_steps
            return [*batches[:start], *batches[into:]][: len(batches)] if epoch == at else batches

        return wrong

    _when_resumed(dealt)


@fault(
    "A164",
    "resume.optimizer_lost",
    real="mlx-lm #97",
    what="A run goes on with its weights alone: the optimizer's averages begin anew.",
)
def forgets_moments() -> None:
    """All of them are zero."""

    def load(right: Callable[..., None], session: Session, folder: Path) -> None:
        right(session, folder)
        forget_moments(session)

    plant_session("load_state", load)


@fault(
    "A164b",
    "resume.optimizer_steps_lost",
    real="",
    what="The optimizer's averages are restored, and the number of its steps is not.",
)
def forgets_steps() -> None:
    """They are corrected as in the first step."""

    def load(right: Callable[..., None], session: Session, folder: Path) -> None:
        right(session, folder)
        forget_steps(session)

    plant_session("load_state", load)


@fault(
    "A164c",
    "resume.random_state_lost",
    real="transformers #35782",
    what="The random state is not restored, so that dropout draws other masks.",
)
def forgets_dice() -> None:
    """It begins as that of a new run."""

    def load(right: Callable[..., None], session: Session, folder: Path) -> None:
        right(session, folder)
        session.reseed(0)

    plant_session("load_state", load)


@fault(
    "A165",
    "resume.lr_restarts",
    real="miles #2661, pytorch-lightning #5486",
    what="The learning rate begins anew in a resumed run.",
)
def rate_restarts() -> None:
    """Its warm-up comes a second time."""
    offset = [0]

    def dealt(batches_of: Batching, plan: LoopPlan, done: int) -> Batching:
        offset[0] = done
        return batches_of

    def rate(right: Callable[..., float], step: int, *given: object, **named: object) -> float:
        return float(right(step - offset[0] if step > offset[0] else step, *given, **named))

    _when_resumed(dealt)
    plant(loop, "learning_rate_at", rate)


@fault(
    "A167",
    "resume.epoch_off_by_one",
    real="torchtune #2911",
    what="A run that was stopped between two epochs repeats one.",
)
def repeats_an_epoch() -> None:
    """The number of epochs done is saved before it is raised."""

    def dealt(batches_of: Batching, plan: LoopPlan, done: int) -> Batching:
        off = done % _each(batches_of, plan) == 0
        return lambda epoch: batches_of(epoch - off if epoch else 0)

    _when_resumed(dealt)


@fault(
    "A168",
    "resume.picks_incomplete",
    real="transformers #35782, #40790",
    what="The newest folder is taken for the newest checkpoint, whether its writer came to an end or not.",
)
def picks_incomplete() -> None:
    """A name is all that is looked at."""

    def steps(right: Callable[..., list[int]], store: CheckpointStore) -> list[int]:
        if not store.folder.is_dir():
            return []
        return sorted(int(path.name[5:]) for path in store.folder.iterdir() if path.name.startswith("step-"))

    def opened(right: Callable[..., Path], store: CheckpointStore, step: int, identity: Mapping[str, object]) -> Path:
        path = store._path(step)
        return path if not (path / "checkpoint.json").exists() else right(store, step, identity)

    plant(CheckpointStore, "steps", steps)
    plant(CheckpointStore, "open", opened)


@fault(
    "A168b",
    "resume.picks_older",
    real="",
    what="A run goes on from the checkpoint before the newest.",
)
def picks_older() -> None:
    """The steps after it are trained a second time, and told a second time."""
    plant(CheckpointStore, "newest", lambda right, store: ([None, *store.steps()][-2:] or [None])[0])


@fault(
    "A169",
    "ckpt.in_place_overwrite",
    real="mlx-lm d78bf58, burn #5479",
    what="A file is written in its own place, so that the old one is gone before the new one is whole.",
)
def in_place() -> None:
    """No temporary name."""

    def written(right: Callable[..., None], path: Path, fill: Callable[[Path], object]) -> None:
        with write.storage_errors(path):
            path.unlink(missing_ok=True)
            fill(path)

    plant(write, "write_file", written)


@fault(
    "A169b",
    "ckpt.folder_reused",
    real="mlx-lm d78bf58",
    what="A second run in the same folder writes over the adapter of the first.",
)
def folder_reused() -> None:
    """A folder that is not empty is as good as any."""

    def place(right: Callable[..., RunFolder], output: Path) -> RunFolder:
        run = RunFolder(output)
        run.tidy()
        for checkpoint in run.checkpoints.glob("step-*"):
            write.remove_folder(checkpoint)
        return run

    plant(RunFolder, "place", place)


@fault(
    "A170",
    "ckpt.rotation_wrong_order",
    real="transformers #26961, accelerate #1163",
    what="Checkpoints are sorted by name, so that step 9 counts as newer than step 10.",
)
def sorts_by_name() -> None:
    """The newest one is removed."""
    plant(CheckpointStore, "steps", lambda right, store: sorted(right(store), key=str))


@fault(
    "A170b",
    "ckpt.best_rotated_away",
    real="",
    what="Only the newest checkpoints stay, whatever was the best.",
)
def loses_the_best() -> None:
    """Nobody remembers which it was."""

    def save(right: Callable[..., Path], store: CheckpointStore, *given: object, best: int | None = None) -> Path:
        path: Path = right(store, *given, best=None)
        return path

    plant(CheckpointStore, "save", save)


@fault(
    "A172",
    "ckpt.rotate_before_save",
    real="SimpleTuner #2989",
    what="Old checkpoints are removed before the new one is there.",
)
def removes_first() -> None:
    """A full disk then costs all of them."""

    def save(right: Callable[..., Path], store: CheckpointStore, *given: object, **named: object) -> Path:
        for step in store.steps():
            write.remove_folder(store._path(step))
        path: Path = right(store, *given, **named)
        return path

    plant(CheckpointStore, "save", save)


@fault(
    "A174",
    "ckpt.best_direction",
    real="transformers #31142, TRL #5811",
    what="The highest loss counts as the best.",
)
def worst_is_best() -> None:
    """As if it were an accuracy."""
    plant(EarlyStopping, "update", lambda right, watch, step, loss: right(watch, step, -loss))


@fault(
    "A175",
    "ckpt.best_not_loaded",
    real="transformers #24103, #23443",
    what="The best step is found, and the last one is kept.",
)
def best_not_loaded() -> None:
    """What is loaded when training is over is not."""
    trained = WeakSet[Session]()

    def update(right: Callable[..., None], session: Session, rate: float) -> None:
        trained.add(session)
        right(session, rate)

    def load(right: Callable[..., None], session: Session, folder: Path) -> None:
        if session not in trained:
            right(session, folder)

    plant_session("update", update)
    plant_session("load_state", load)


@fault("A177", "ckpt.bytes_rot_unnoticed", real="ollama #17520", what="Bytes that have changed are not noticed.")
def trusts_damage() -> None:
    """No hash is looked at."""

    def opened(right: Callable[..., Path], store: CheckpointStore, step: int, identity: Mapping[str, object]) -> Path:
        store._in_use.add(step)
        return store._path(step)

    plant(CheckpointStore, "open", opened)


@fault("A179", "ckpt.disk_full_silent", real="unsloth #1122", what="A write that failed is not told.")
def silent_full_disk() -> None:
    """The error is swallowed."""

    @contextlib.contextmanager
    def quiet(right: Callable[..., Iterator[None]], path: Path) -> Iterator[None]:
        with contextlib.suppress(OSError):
            yield

    plant(write, "storage_errors", quiet)


@fault(
    "A179b",
    "ckpt.short_write_kept",
    real="",
    what="What the disk took of a checkpoint before it was full is put in its place as if it were whole.",
)
def short_write_kept() -> None:
    """The error of the writer is swallowed, and its folder gets its name."""

    def written(right: Callable[..., None], path: Path, fill: Callable[[Path], object]) -> None:
        def partly(folder: Path) -> None:
            with contextlib.suppress(OSError):
                fill(folder)
            if not (folder / "checkpoint.json").exists():
                (folder / "checkpoint.json").write_text("{}", encoding="utf-8")

        right(path, partly)

    plant(checkpoints, "write_folder", written)
