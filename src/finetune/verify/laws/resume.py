"""Laws of runs that were stopped: nothing is lost, and nothing is trained twice."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np

from finetune.verify.catalogue import Law, add, law, oracle
from finetune.verify.check import check
from finetune.verify.client import SubjectClient
from finetune.verify.laws.helpers import adapter_of, refused, train, weights_of
from finetune.verify.subjects.answers import Loss, TrainedStep, TrainingResult
from finetune_strategies.cases import resume as cases
from finetune_strategies.cases.rows import TINY


def _same_end(trainer: SubjectClient, whole: TrainingResult, pieces: TrainingResult) -> None:
    model = trainer.model(TINY)
    (_, wanted), (_, found) = (weights_of(trainer, model, adapter_of(each)) for each in (whole, pieces))
    for name, tensor in wanted.items():
        off = float(np.abs(found[name] - tensor).max()) if name in found else float("inf")
        check(off <= 1e-5, expected=f"{name} as in the run that nobody stopped", got=f"off by {off:.3g}")


@law("resume.same", ["train", "resume", "adapter_weights"], cases.STOPPED, examples=6, cost=8)
@oracle("the same run without a stop")
def stopped_run_is_the_run(trainer: SubjectClient, case: cases.Stopped) -> None:
    """A run that is stopped at any step and gone on with is the run that was never stopped."""
    folder = trainer.folder() / "run"
    given: dict[str, Any] = {"model": trainer.model(TINY), "settings": case.settings, "rows": case.values}
    whole = train(trainer, **given)
    parts = [trainer.ask("train", TrainingResult, stop_after=case.stops[0], folder=folder, **given)]
    check(parts[0].adapter is None, expected="no adapter of a run that was stopped", got=parts[0].adapter)
    for stop in case.stops[1:]:
        parts.append(trainer.ask("resume", TrainingResult, folder=folder, stop_after=stop))
    parts.append(trainer.ask("resume", TrainingResult, folder=folder))
    for begin, end, part in zip((0, *case.stops), (*case.stops, len(whole.steps)), parts, strict=True):
        numbers = [step.step for step in part.steps]
        count = end - begin
        check(len(numbers) == count, expected=f"{count} steps after step {begin}", got=numbers)
        # Commands that tell no numbers are counted from 1 whenever they go on.
        if len(case.stops) > 1:
            check(numbers[:1] == [begin + 1], expected=f"to go on with step {begin + 1}", got=numbers)
        for right, found in zip(whole.steps[begin:end], part.steps, strict=True):
            _same_step(right, found)
    _same_end(trainer, whole, parts[-1])


def _same_step(right: TrainedStep, found: TrainedStep) -> None:
    """The loss and the learning rate, where both are told."""
    if right.loss is not None and found.loss is not None:
        near = abs(found.loss - right.loss) <= 1e-6 * (1 + abs(right.loss))
        check(near, expected=f"loss {right.loss} at step {right.step}", got=found.loss)
    if right.learning_rate is not None and found.learning_rate is not None:
        near = abs(found.learning_rate - right.learning_rate) <= 1e-6 * abs(right.learning_rate)
        check(near, expected=f"learning_rate {right.learning_rate} at step {right.step}", got=found.learning_rate)


@law(
    "resume.damaged", ["train", "resume", "adapter_weights"], cases.RESUME_DAMAGED, scene="training", examples=4, cost=4
)
@oracle("a refusal, or the end of the run that nobody damaged")
def damaged_checkpoint_is_noticed(trainer: SubjectClient, case: cases.Damaged) -> None:
    """A run does not go on from a damaged checkpoint."""
    model, folder = trainer.model(TINY), trainer.folder() / "run"
    given: dict[str, Any] = {"model": model, "settings": cases.RUN, "rows": case.values}
    begun = trainer.ask("train", TrainingResult, stop_after=2, folder=folder, **given)
    newest = Path(begun.checkpoints[max(begun.checkpoints, key=int)])
    files = [newest] if newest.is_file() else [path for path in newest.rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    # The numbers of a safetensors file begin after its head, and those of any other somewhere behind its own.
    head = min(8 + int.from_bytes(content[:8], "little"), len(content))
    begin = head if file.suffix == ".safetensors" else len(content) * 3 // 10
    start = min(begin + (len(content) - begin) * case.place // 1000, max(0, len(content) - 16))
    content[start : start + 16] = bytes(byte ^ 2 for byte in content[start : start + 16])
    file.write_bytes(content)
    ended = refused(lambda: trainer.ask("resume", TrainingResult, folder=folder))
    if ended is not None:
        _same_end(trainer, train(trainer, **given), ended)


_TOLD = re.compile(r'(loss": ?-?)(\d)')


@law("resume.log", ["train", "resume", "adapter_weights"], cases.RESUME_LOG, scene="training", examples=4, cost=4)
@oracle("a refusal, or the end of the run that nobody damaged")
def damaged_log_decides_nothing(trainer: SubjectClient, case: cases.Logged) -> None:
    """Losses that were changed in what a run has written down choose no other weights when it goes on."""
    folder = trainer.folder() / "run"
    given: dict[str, Any] = {"model": trainer.model(TINY), "settings": cases.BEST, "rows": case.values}
    trainer.ask("train", TrainingResult, stop_after=3, folder=folder, **given)
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.json*"))}
    count = sum(len(_TOLD.findall(text)) for text in texts.values())
    wrong, numbers = {place % count for place in case.places} if count else set(), itertools.count()

    def changed(found: re.Match[str]) -> str:
        digit = "0" if found[2] != "0" else "9"
        return found[1] + (digit if next(numbers) in wrong else found[2])

    for path, text in texts.items():
        path.write_text(_TOLD.sub(changed, text), encoding="utf-8")
    ended = refused(lambda: trainer.ask("resume", TrainingResult, folder=folder))
    if ended is not None:
        _same_end(trainer, train(trainer, **given), ended)


@law("resume.onward", ["train", "go_on", "evaluate"], cases.ONWARD, examples=6, cost=4)
@oracle("the loss of the model with the first adapter on the same rows, as it is measured without training")
def adapter_is_gone_on_from(trainer: SubjectClient, case: cases.Onward) -> None:
    """A run that goes on from an adapter begins as the model that this adapter makes of its base."""
    model = trainer.model(TINY)
    first = adapter_of(train(trainer, model, case.settings, case.values))
    looked = {"model": model, "settings": case.settings, "rows": case.more}
    wanted = trainer.ask("evaluate", Loss, adapter=first, **looked).loss
    given = {"model": model, "settings": case.onward, "rows": case.more, "folder": trainer.folder() / "onward"}
    steps = trainer.ask("go_on", TrainingResult, adapter=first, **given).steps
    check(bool(steps), expected="steps", got=steps)
    told = steps[0].loss
    if told is not None:
        near = abs(told - wanted) <= 1e-3 * (1 + abs(wanted))
        check(near, expected=f"loss {wanted:.6f} at its first step", got=f"loss {told:.6f}")


@law("resume.longer", ["train", "lengthen", "adapter_weights"], cases.LONGER, examples=6, cost=6)
@oracle("the same run, planned so long from its start")
def longer_run_is_the_long_run(trainer: SubjectClient, case: cases.Longer) -> None:
    """A run that is made longer goes on by the rates of one planned so long; with a constant rate it is that run."""
    model, folder = trainer.model(TINY), trainer.folder() / "run"
    planned, longer = ({**case.settings, "training.epochs": each} for each in (case.epochs, case.epochs + case.more))
    begun = trainer.ask("train", TrainingResult, model=model, settings=planned, rows=case.values, folder=folder)
    whole = train(trainer, model, longer, case.values)
    ended = trainer.ask("lengthen", TrainingResult, folder=folder, epochs=case.epochs + case.more)
    done, wanted = len(begun.steps), whole.steps[len(begun.steps) :]
    check(bool(wanted), expected=f"more than {done} steps of {case.epochs + case.more} epochs", got=len(whole.steps))
    numbers = [step.step for step in ended.steps]
    check(numbers == [step.step for step in wanted], expected=f"{len(wanted)} steps after step {done}", got=numbers)
    for right, found in zip(wanted, ended.steps, strict=True):
        # Other rates before have left other weights: losses are alike where the rate is constant.
        _same_step(right if case.schedule == "constant" else right.model_copy(update={"loss": None}), found)
    if case.schedule == "constant":
        _same_end(trainer, whole, ended)


_STORIES = {
    "resume.newest": "A run goes on from its newest complete checkpoint.",
    "resume.refuses_changed": "With a setting changed that changes weights no run goes on: it is refused by its name.",
}
for _id, _statement in _STORIES.items():
    add(Law(_id, _statement, ("life",), "what lay on the disk before", scene="training", tier=2, cost=30))
