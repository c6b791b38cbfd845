"""Makes a run longer than it was planned: resumed, with more epochs or steps.

The learning rate of the steps to come is that of a run which was planned so long from its start, as it is with the
Trainer of transformers: a constant one stays what it was, and one that had gone down may be higher again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil

from finetune.config import Origin, Plan
from finetune.errors import OutputError, RefusedError, UsageError
from finetune.events import Event, RunLengthened
from finetune.run.checkpoints import CheckpointStore
from finetune.run.folder import RunFolder
from finetune.training.early_stopping import EarlyStopping
from finetune.training.prepare import Prepared, steps_of_an_epoch, with_steps

_NEW_RUN = "train on in a new run instead: ft train --model RUN goes on from its adapter"


@dataclass(frozen=True, slots=True)
class Longer:
    """How long a run is to be from now on: in epochs, in steps, or in epochs and at most so many steps."""

    epochs: float | None = None
    max_steps: int | None = None


def lengthen(prepared: Prepared, longer: Longer) -> Prepared:
    """The same run, planned to end later (or earlier); nothing but its length changes."""
    plan, rows = prepared.plan, prepared.training_rows
    epochs = longer.epochs
    if epochs is None:  # as many as the steps take
        assert longer.max_steps is not None
        epochs = float(ceil(longer.max_steps / steps_of_an_epoch(plan, rows)))
    training = plan.config.training.model_copy(update={"epochs": epochs, "max_steps": longer.max_steps})
    named = {"training.epochs": longer.epochs, "training.max_steps": longer.max_steps}
    changed: dict[str, Origin] = {key: "derived" if value is None else "flag" for key, value in named.items()}
    origins = {**plan.origins, **changed}
    longer_plan = Plan(plan.config.model_copy(update={"training": training}), origins)
    longer_plan, total = with_steps(longer_plan, prepared.shape, rows)
    return replace(prepared, plan=longer_plan, total_steps=total)


def lengthening(folder: RunFolder, before: Prepared, after: Prepared) -> RunLengthened | None:
    """What making a run longer changes from its newest checkpoint on; None where it was planned so long already."""
    settings = _lengths(before.plan)
    if settings == _lengths(after.plan) and not folder.manifest.exists():
        return None  # asked for again, after it was interrupted
    done = CheckpointStore(folder.checkpoints).newest() or 0
    return RunLengthened(done, before.total_steps, after.total_steps, settings)


def earlier_lengths(folder: RunFolder, planned: Prepared | None) -> list[Mapping[str, object]]:
    """The settings of length that checkpoints of this run may have, beside those of its plan, as its log tells them.

    Args:
        planned: the run as it was planned before it is made longer now.
    """
    told = [event.before for event in folder.read_events() if isinstance(event, RunLengthened)]
    return [*told, *([_lengths(planned.plan)] if planned else [])]


def check_longer(folder: RunFolder, event: RunLengthened, stopping: EarlyStopping) -> None:
    """Refuse, before anything is done, to make a run longer that has nothing to gain or to go on from.

    Raises:
        OutputError: files were made of the adapter as it is, which would no longer be that of the run.
        UsageError: it has done as many steps already.
        RefusedError: early stopping has ended it, or it has no checkpoint.
    """
    finished = folder.manifest.exists()
    if event.step == 0 and finished:
        raise RefusedError(
            f"{folder.path} has no checkpoint to go on from: {folder.checkpoints} is gone", hint=_NEW_RUN
        )
    if event.total_steps < event.step or (finished and event.total_steps == event.step):
        raise UsageError(
            f"{folder.path} has done {event.step} steps, and it is to end with step {event.total_steps}",
            hint=f"name more than {event.step} steps (--max-steps), or more epochs (--epochs)",
        )
    if stopping.stops:
        raise RefusedError(
            f"{folder.path} was stopped early at step {event.step}: its held-out loss had not improved for "
            f"{stopping.patience_used} looks, so it would stop again",
            hint=_NEW_RUN,
        )
    made = [path.name for path in (folder.merged, folder.gguf, folder.deploy) if path.exists()]
    if made:
        raise OutputError(
            f"{folder.path} holds what was made of its adapter as it is: {', '.join(made)}",
            hint="move it elsewhere or delete it; it can be made again once the run is longer",
        )


def lengthening_notes(rates: Mapping[int, float], events: Iterable[Event]) -> list[str]:
    """A sentence for each time that the run was made longer; `rates` are the learning rates of its steps."""
    told = [event for event in events if isinstance(event, RunLengthened)]
    return [
        f"the run was made longer after step {each.step}: from {each.planned_steps} to {each.total_steps} steps; from "
        "there on the learning rate is that of a run planned so from its start: "
        f"{rates[each.step]:.3g} at step {each.step}, {rates[each.step + 1]:.3g} at step {each.step + 1}"
        for each in told
        if {each.step, each.step + 1} <= rates.keys()
    ]


def _lengths(plan: Plan) -> dict[str, float | None]:
    training = plan.config.training
    return {"training.epochs": training.epochs, "training.max_steps": training.max_steps}
