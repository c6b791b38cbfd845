"""Faults of resuming, of checkpoints, and of files on the disk."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import finetune.train as training
from finetune import files as write
from finetune.events import Event
from finetune.evidence import starting
from finetune.ports import Session
from finetune.records import AdapterTarget, Batch
from finetune.run import checkpoints
from finetune.run.checkpoints import CheckpointStore
from finetune.run.folder import RunFolder
from finetune.run.log import EventLog
from finetune.training import loop
from finetune.training.early_stopping import EarlyStopping
from finetune.training.loop import Batching, LoopPlan
from finetune.training.run import Run
from finetune.training.start import Start
from finetune.verify.faults.fault import fault, in_place_of, plant, planted_by
from finetune.verify.faults.sessions import forget_moments, forget_steps, plant_session

Stepping = Callable[..., Iterator[Event]]
Opening = Callable[..., Path]


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
    count: int = math.ceil(len(batches_of(0)) / plan.gradient_accumulation_steps)
    return count


@fault("A160", "resume.epoch0_order", "transformers #8878, #40691")
def _first_order_again() -> None:
    """A resumed run deals the rows out as in the first epoch."""
    _when_resumed(lambda batches_of, plan, done: lambda epoch: batches_of(0))


@fault("A162", "resume.skip_in_wrong_unit", "transformers #5605")
@planted_by(_when_resumed)
def _skips_too_few(batches_of: Batching, plan: LoopPlan, done: int) -> Batching:
    """A resumed run skips as many batches as steps were done."""
    at, into = divmod(done, _each(batches_of, plan))

    def wrong(epoch: int) -> Sequence[Batch]:
        batches = batches_of(epoch)
        start = into * plan.gradient_accumulation_steps
        return [*batches[:start], *batches[into:]][: len(batches)] if epoch == at else batches

    return wrong


@fault("A164", "resume.optimizer_lost", "mlx-lm #97")
@planted_by(plant_session, "load_state")
def _forgets_moments(right: Callable[..., None], session: Session, folder: Path) -> None:
    """A run goes on with its weights alone: the optimizer's averages begin anew."""
    right(session, folder)
    forget_moments(session)


@fault("A164b", "resume.optimizer_steps_lost")
@planted_by(plant_session, "load_state")
def _forgets_steps(right: Callable[..., None], session: Session, folder: Path) -> None:
    """The optimizer's averages are restored, and the number of its steps is not."""
    right(session, folder)
    forget_steps(session)


@fault("A164c", "resume.random_state_lost", "transformers #35782")
@planted_by(plant_session, "load_state")
def _forgets_dice(right: Callable[..., None], session: Session, folder: Path) -> None:
    """The random state is not restored, so that dropout draws other masks."""
    right(session, folder)
    session.reseed(0)


@fault("A165", "resume.lr_restarts", "miles #2661, pytorch-lightning #5486")
def _rate_restarts() -> None:
    """The learning rate begins anew in a resumed run."""
    offset = [0]

    def dealt(batches_of: Batching, plan: LoopPlan, done: int) -> Batching:
        offset[0] = done
        return batches_of

    def rate(right: Callable[..., float], step: int, *given: object, **named: object) -> float:
        return float(right(step - offset[0] if step > offset[0] else step, *given, **named))

    _when_resumed(dealt)
    plant(loop, "learning_rate_at", rate)


@fault("A164d", "resume.longer_with_fresh_optimizer")
@in_place_of("load_newest", training)
def _longer_forgets_moments(right: Callable[..., int], run: Run, session: Session, *given: object) -> int:
    """A run that is made longer goes on with its weights alone: the optimizer's averages begin anew."""
    done = right(run, session, *given)
    if run.planned is not None:
        forget_moments(session)
    return done


@fault("A165b", "resume.longer_as_planned_before")
def _longer_by_the_short_plan() -> None:
    """The rates of the steps that a run is made longer by are those that its end had fallen to."""
    planned = [0]

    def events(right: Callable[..., Iterator[Event]], run: Run, *given: object, **named: object) -> Iterator[Event]:
        planned[0] = run.planned.total_steps if run.planned else 0
        return right(run, *given, **named)

    def rate(right: Callable[..., float], step: int, total: int, **named: object) -> float:
        end = planned[0]
        return float(right(min(step, end) if end else step, end or total, **named))

    plant(training, "training_events", events)
    plant(loop, "learning_rate_at", rate)


@fault("A166", "resume.onward_from_a_fresh_adapter")
@in_place_of("put_on", Start)
def _fresh_adapter(right: Callable[..., None], start: Start, session: Session, base: str) -> None:
    """A run that is to go on from an adapter begins with a fresh one of its shape."""


@fault("A166b", "resume.onward_with_another_scale")
@in_place_of("read_settings", starting)
def _another_scale(right: Callable[..., AdapterTarget], folder: Path, **named: Any) -> AdapterTarget:
    """A run goes on from an adapter's tensors with another scale than theirs."""
    found = right(folder, **named)
    return replace(found, alpha=2 * found.alpha, scaling="standard")


@fault("A167", "resume.epoch_off_by_one", "torchtune #2911")
@planted_by(_when_resumed)
def _repeats_an_epoch(batches_of: Batching, plan: LoopPlan, done: int) -> Batching:
    """A run that was stopped between two epochs repeats one."""
    off = done % _each(batches_of, plan) == 0
    return lambda epoch: batches_of(epoch - off if epoch else 0)


@fault("A168", "resume.picks_incomplete", "transformers #35782, #40790")
def _picks_incomplete() -> None:
    """The newest folder is taken for the newest checkpoint, whether its writer came to an end or not."""

    def steps(right: Callable[..., list[int]], store: CheckpointStore) -> list[int]:
        if not store.folder.is_dir():
            return []
        return sorted(int(path.name[5:]) for path in store.folder.iterdir() if path.name.startswith("step-"))

    def opened(right: Opening, store: CheckpointStore, step: int, identity: Mapping[str, object]) -> Path:
        path = store._path(step)
        return path if not (path / "checkpoint.json").exists() else right(store, step, identity)

    plant(CheckpointStore, "steps", steps)
    plant(CheckpointStore, "open", opened)


@fault("A168b", "resume.picks_older")
def _picks_older() -> None:
    """A run goes on from the checkpoint before the newest."""
    plant(CheckpointStore, "newest", lambda right, store: ([None, *store.steps()][-2:] or [None])[0])


@fault("A169", "ckpt.in_place_overwrite", "mlx-lm d78bf58, burn #5479")
@in_place_of("write_file", write)
def _in_place(right: Callable[..., None], path: Path, fill: Callable[[Path], object]) -> None:
    """A file is written in its own place, so that the old one is gone before the new one is whole."""
    with write.storage_errors(path):
        path.unlink(missing_ok=True)
        fill(path)


@fault("A169b", "ckpt.folder_reused", "mlx-lm d78bf58")
@in_place_of("place", RunFolder)
def _folder_reused(right: Callable[..., RunFolder], output: Path) -> RunFolder:
    """A second run in the same folder writes over the adapter of the first."""
    run = RunFolder(output)
    run.tidy()
    for checkpoint in run.checkpoints.glob("step-*"):
        write.remove_folder(checkpoint)
    return run


@fault("A170", "ckpt.rotation_wrong_order", "transformers #26961, accelerate #1163")
def _sorts_by_name() -> None:
    """Checkpoints are sorted by name, so that step 9 counts as newer than step 10."""
    plant(CheckpointStore, "steps", lambda right, store: sorted(right(store), key=str))


@fault("A170b", "ckpt.best_rotated_away")
@in_place_of("save", CheckpointStore)
def _loses_the_best(right: Opening, store: CheckpointStore, *given: object, best: int | None = None) -> Path:
    """Only the newest checkpoints stay, whatever was the best."""
    path: Path = right(store, *given, best=None)
    return path


@fault("A172", "ckpt.rotate_before_save", "SimpleTuner #2989")
@in_place_of("save", CheckpointStore)
def _removes_first(right: Opening, store: CheckpointStore, *given: object, **named: object) -> Path:
    """Old checkpoints are removed before the new one is there."""
    for step in store.steps():
        write.remove_folder(store._path(step))
    path: Path = right(store, *given, **named)
    return path


@fault("A174", "ckpt.best_direction", "transformers #31142, TRL #5811")
def _worst_is_best() -> None:
    """The highest loss counts as the best."""
    plant(EarlyStopping, "update", lambda right, watch, step, loss: right(watch, step, -loss))


@fault("A175", "ckpt.best_not_loaded", "transformers #24103, #23443")
def _best_not_loaded() -> None:
    """The best step is found, and the last one is kept."""
    trained = WeakSet[Session]()

    def update(right: Callable[..., None], session: Session, rate: float) -> None:
        trained.add(session)
        right(session, rate)

    def load(right: Callable[..., None], session: Session, folder: Path) -> None:
        if session not in trained:
            right(session, folder)

    plant_session("update", update)
    plant_session("load_state", load)


@fault("A177", "ckpt.bytes_rot_unnoticed", "ollama #17520")
@in_place_of("open", CheckpointStore)
def _trusts_damage(right: Opening, store: CheckpointStore, step: int, identity: Mapping[str, object]) -> Path:
    """Bytes that have changed are not noticed."""
    store._in_use.add(step)
    return store._path(step)


@fault("A177b", "ckpt.log_rots_unnoticed")
@in_place_of("lines", EventLog)
def _trusts_the_log(right: Callable[..., Iterator[bytes]], log: EventLog) -> list[bytes]:
    """What a changed log tells is believed."""
    content = log.path.read_bytes() if log.path.exists() else b""
    return [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


@fault("A179", "ckpt.disk_full_silent", "unsloth #1122")
@in_place_of("storage_errors", write)
@contextlib.contextmanager
def _silent_full_disk(right: Callable[..., Iterator[None]], path: Path) -> Iterator[None]:
    """A write that failed is not told."""
    with contextlib.suppress(OSError):
        yield


@fault("A179b", "ckpt.short_write_kept")
@in_place_of("write_folder", checkpoints)
def _short_write_kept(right: Callable[..., None], path: Path, fill: Callable[[Path], object]) -> None:
    """What the disk took of a checkpoint before it was full is put in its place as if it were whole."""

    def partly(folder: Path) -> None:
        with contextlib.suppress(OSError):
            fill(folder)
        if not (folder / "checkpoint.json").exists():
            (folder / "checkpoint.json").write_text("{}", encoding="utf-8")

    right(path, partly)


@fault("A178", "ckpt.saving_freezes", "ms-swift #9452")
def _saving_freezes() -> None:
    """What is saved on the way is frozen to be saved, and stays so."""
    frozen: WeakSet[Session] = WeakSet()

    def save(right: Callable[..., None], session: Session, folder: Path) -> None:
        right(session, folder)
        frozen.add(session)

    plant_session("save_state", save)
    plant_session("update", lambda right, session, rate: right(session, 0.0 if session in frozen else rate))
