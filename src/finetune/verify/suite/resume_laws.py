"""Laws of runs that were stopped, and of what stays on the disk: nothing is lost, nothing is trained twice."""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from hypothesis import strategies as st
from pydantic import Field

from finetune.verify.doors.answers import CheckpointsReply, Content, Done, Loss, TrainingResult
from finetune.verify.doors.door import RefusesError
from finetune.verify.recipes import Recipe
from finetune.verify.suite.cases import TINY, Pair, Rows, rows_of
from finetune.verify.suite.catalogue import law
from finetune.verify.suite.learned import ONE_ROW, QUICK, adapter_of, marks, refused, train, weights_of
from finetune.verify.suite.trainer import Trainer
from finetune.verify.suite.verdicts import check

_RUN: dict[str, Any] = {
    **QUICK,
    "training.batch_size": 1,
    "training.accumulation": 2,
    "training.epochs": 3.0,
    "training.save_every": 1,
    "training.schedule": "linear",
    "training.warmup_fraction": 0.34,
    "adapter.dropout": 0.2,
    "training.learning_rate": 5e-3,
}


class TwiceStoppedCase(Rows):
    """A run of three epochs of five rows, ended after these steps."""

    stops: Annotated[tuple[int, int], Field(strict=False)]


_STOPS = st.sampled_from([(3, 5), (1, 6), (4, 6), (2, 3)])
_FIVE = st.just(tuple(Pair(prompt="q" * (1 + number), completion=f"{number} of five") for number in range(5)))


def _same_end(trainer: Trainer, whole: TrainingResult, pieces: TrainingResult) -> None:
    model = trainer.model(TINY)
    (_, wanted), (_, found) = (weights_of(trainer, model, adapter_of(each)) for each in (whole, pieces))
    for name, tensor in wanted.items():
        off = float(np.abs(found[name] - tensor).max()) if name in found else float("inf")
        check(off <= 1e-5, expected=f"{name} as in the run that nobody stopped", got=f"off by {off:.3g}")


@law(
    "resume.same",
    "A run that is stopped at any step and gone on with is the run that was never stopped.",
    needs=["train", "resume", "adapter_weights"],
    oracle="the same run without a stop",
    cases=st.builds(TwiceStoppedCase, rows=_FIVE, stops=_STOPS),
    examples=4,
    cost=8,
)
def stopped_run_is_the_run(trainer: Trainer, case: TwiceStoppedCase) -> None:
    """Its losses and rates, step by step, and its adapter; one of the two stops is between epochs."""
    model = trainer.model(TINY)
    whole = train(trainer, model, _RUN, case.values)
    right = {step.step: step for step in whole.steps}
    folder = trainer.folder() / "run"
    given = {"model": model, "settings": _RUN, "rows": case.values, "folder": folder}
    begun = trainer.ask("train", TrainingResult, stop_after=case.stops[0], **given)
    check(begun.adapter is None, expected="no adapter of a run that was stopped", got=begun.adapter)
    parts = [begun, trainer.ask("resume", TrainingResult, folder=folder, stop_after=case.stops[1])]
    parts.append(trainer.ask("resume", TrainingResult, folder=folder))
    for at, part in zip((0, *case.stops), parts, strict=True):
        steps = [step.step for step in part.steps]
        check(steps[:1] == [at + 1], expected=f"to go on with step {at + 1}", got=steps)
        for step in part.steps:
            for what in ("loss", "learning_rate"):
                wanted, found = getattr(right[step.step], what), getattr(step, what)
                near = None in (wanted, found) or abs(found - wanted) <= 1e-6 * (1 + abs(wanted))
                if what == "learning_rate" and None not in (wanted, found):
                    near = abs(found - wanted) <= 1e-6 * abs(wanted)
                check(near, expected=f"{what} {wanted} at step {step.step}", got=found)
    _same_end(trainer, whole, parts[-1])


class Damaged(Rows):
    """A run that is stopped at a step, and a place among its checkpoint's numbers, in thousandths."""

    place: Annotated[int, Field(ge=0, le=999)]


def _numbers_begin(file: Path, content: bytes | bytearray) -> int:
    """Where a file's numbers begin: after the head of a safetensors file, and somewhere behind that of any other."""
    if file.suffix == ".safetensors":
        return min(8 + int.from_bytes(content[:8], "little"), len(content))
    return len(content) * 3 // 10


@law(
    "resume.damaged",
    "A run does not go on from a checkpoint of which a few bytes have changed.",
    needs=["train", "resume", "adapter_weights"],
    oracle="a refusal, or the end of the run that nobody damaged",
    cases=st.builds(Damaged, rows=rows_of(2, 2), place=st.integers(0, 999)),
    examples=4,
    cost=4,
)
def damaged_checkpoint_is_noticed(trainer: Trainer, case: Damaged) -> None:
    """Sixteen bytes of the largest file of the newest checkpoint: two numbers at least, with their exponents."""
    model, folder = trainer.model(TINY), trainer.folder() / "run"
    given: dict[str, Any] = {"model": model, "settings": _RUN, "rows": case.values}
    begun = trainer.ask("train", TrainingResult, stop_after=2, folder=folder, **given)
    newest = Path(begun.checkpoints[max(begun.checkpoints, key=int)])
    files = [newest] if newest.is_file() else [path for path in newest.rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    begin = _numbers_begin(file, content)
    start = min(begin + (len(content) - begin) * case.place // 1000, max(0, len(content) - 16))
    content[start : start + 16] = bytes(byte ^ 2 for byte in content[start : start + 16])
    file.write_bytes(content)
    ended = refused(lambda: trainer.ask("resume", TrainingResult, folder=folder))
    if ended is not None:
        _same_end(trainer, train(trainer, **given), ended)


@law(
    "runs.untouched",
    "What a run has made stays as it is, whatever runs come after it.",
    needs=["train"],
    oracle="the bytes of its adapter before and after",
    cases=st.builds(Rows, rows=rows_of(1, 2)),
    examples=2,
    cost=3,
)
def earlier_run_is_left_alone(trainer: Trainer, case: Rows) -> None:
    """A second run in the same folder is refused, or leaves the first one's adapter as it is."""
    given = {"model": trainer.model(TINY), "rows": case.values, "folder": trainer.folder() / "run"}
    settings = {**QUICK, "training.batch_size": 1}
    adapter = Path(adapter_of(trainer.ask("train", TrainingResult, settings=settings, **given)))
    before = marks(adapter)
    again = {**settings, "training.seed": 5}
    refused(lambda: trainer.ask("train", TrainingResult, settings=again, **given))
    check(marks(adapter) == before, expected="the first run's adapter as it was", got="another one in its place")


class Best(Rows):
    """Rows to train on, and one to watch."""

    watched: Pair
    rate: Annotated[float, Field(gt=0)]


@law(
    "keep.best",
    "A run that is to keep its best step ends with the step whose held-out loss was lowest.",
    needs=["train", "evaluate"],
    oracle="the same run ended after each step, each looked at",
    cases=st.builds(
        Best,
        rows=ONE_ROW,
        watched=st.builds(Pair, prompt=st.just("q"), completion=st.sampled_from(["zz", "a"])),
        rate=st.just(0.4),
    ),
    examples=2,
    cost=8,
)
def best_step_is_kept(trainer: Trainer, case: Best) -> None:
    """Four steps so large that the last is rarely the best."""
    model, watched = trainer.model(TINY), [case.watched.model_dump()]
    file = trainer.folder() / "valid.jsonl"
    file.write_text(case.watched.model_dump_json() + "\n", encoding="utf-8")
    settings = {**QUICK, "training.learning_rate": case.rate, "training.epochs": 4.0, "training.save_every": 1}
    settings |= {"data.valid": str(file), "training.evaluate_every": 1}

    def look(**more: Any) -> float:
        adapter = adapter_of(train(trainer, model, {**settings, **more}, case.values))
        return trainer.ask("evaluate", Loss, model=model, settings=QUICK, rows=watched, adapter=adapter).loss

    looks = [look(**{"training.max_steps": steps}) for steps in (1, 2, 3, 4)]
    kept = look(**{"training.keep": "best"})
    check(abs(kept - min(looks)) <= 1e-4 * (1 + kept), expected=f"the lowest of {looks}", got=kept)


class Orders(Recipe):
    """Steps whose checkpoints are saved one after the other, and which of them is the best from then on."""

    steps: Annotated[tuple[int, ...], Field(min_length=3, max_length=5, strict=False)]
    best: Annotated[int, Field(ge=0, le=1)]
    keep: Annotated[int, Field(ge=1, le=2)]


_ORDERS = st.builds(
    Orders,
    steps=st.sampled_from([(8, 9, 10, 11), (1, 2, 3), (98, 99, 100), (9_999, 10_000, 10_001, 10_002)]),
    best=st.integers(0, 1),
    keep=st.integers(1, 2),
)


def _kept(trainer: Trainer, keep: int, orders: list[dict[str, Any]]) -> CheckpointsReply:
    return trainer.ask("keep_checkpoints", CheckpointsReply, keep=keep, orders=orders)


@law(
    "store.keeps",
    "A store keeps the newest checkpoints, by their numbers, and the best one.",
    needs=["keep_checkpoints"],
    oracle="the numbers themselves",
    cases=_ORDERS,
    examples=6,
)
def newest_and_best_stay(trainer: Trainer, case: Orders) -> None:
    """What is listed after the last one was saved, and what the best one holds."""
    best = case.steps[case.best]
    orders = [{"do": "save", "step": step, "content": f"of {step}", "best": min(best, step)} for step in case.steps]
    found = _kept(trainer, case.keep, [*orders, {"do": "open", "step": best}])
    wanted = sorted({best, *case.steps[-case.keep :]})
    check(found.listed == wanted, expected=wanted, got=found.listed)
    check(found.found[-1] == f"of {best}", expected=f"the content of {best}", got=found.found[-1] or found.refused[-1])


@law(
    "store.full_disk",
    "Where the disk is full it is said, and every checkpoint that was whole before still is.",
    needs=["keep_checkpoints"],
    oracle="what was saved before",
    cases=_ORDERS,
    examples=4,
)
def full_disk_costs_nothing(trainer: Trainer, case: Orders) -> None:
    """The last of them does not fit: it is refused, and the one before is there."""
    *before, last = case.steps
    orders = [{"do": "save", "step": step, "content": f"of {step}"} for step in before]
    orders += [{"do": "fill", "step": last, "content": f"of {last}"}, {"do": "open", "step": before[-1]}]
    found = _kept(trainer, case.keep, orders)
    check(found.refused[-2], expected="a word of the full disk", got="nothing")
    said = found.found[-1] or found.refused[-1]
    check(said == f"of {before[-1]}", expected=f"of {before[-1]}", got=said)
    wanted = before[-case.keep :]
    check(found.listed == wanted, expected=wanted, got=found.listed)


@law(
    "store.torn",
    "What a writer left that died is neither listed nor opened, and the newest whole one is gone on from.",
    needs=["keep_checkpoints"],
    oracle="only what was saved to its end",
    cases=_ORDERS,
    examples=4,
)
def torn_checkpoint_is_none(trainer: Trainer, case: Orders) -> None:
    """A later step of which there is a file and nothing else."""
    *before, last = case.steps
    orders: list[dict[str, Any]] = [{"do": "save", "step": step, "content": f"of {step}"} for step in before]
    orders += [{"do": "tear", "step": last, "content": "torn"}, {"do": "open", "step": last}]
    found = _kept(trainer, case.keep, orders)
    check(last not in found.listed, expected=f"{last} is not listed", got=found.listed)
    check(found.refused[-1], expected="a refusal", got=found.found[-1])


@law(
    "store.damaged",
    "A checkpoint of which a byte has changed is refused.",
    needs=["keep_checkpoints"],
    oracle="what was saved",
    cases=_ORDERS,
    examples=2,
)
def damaged_one_is_refused(trainer: Trainer, case: Orders) -> None:
    """It is opened after a letter of it was changed."""
    step = case.steps[0]
    found = _kept(trainer, case.keep, [{"do": do, "step": step, "content": "of"} for do in ("save", "damage", "open")])
    check(found.refused[-1], expected="a refusal", got=found.found[-1])


class Replaced(Recipe):
    """A text, another that takes its place, and how many letters of that the disk takes."""

    before: str
    after: str
    room: Annotated[int, Field(ge=0, le=9)]


@law(
    "files.whole",
    "A file that is written anew holds the old content or the new one, whatever happens; a failure is told.",
    needs=["replace_file"],
    oracle="the two contents",
    cases=st.builds(
        Replaced, before=st.just("before"), after=st.sampled_from(["after", "x"]), room=st.sampled_from([0, 2, 9])
    ),
    examples=6,
)
def file_is_old_or_new(trainer: Trainer, case: Replaced) -> None:
    """What it holds in the end."""
    given = {"before": case.before, "after": case.after, "room": case.room}
    fits = case.room >= len(case.after)
    found = trainer.ask("replace_file", Content, **given)
    check(found.text == (case.after if fits else case.before), expected="the old text or the new", got=found.text)
    check(found.refused is not fits, expected="a word where it failed", got=f"refused: {found.refused}")


class DiskSpaceCase(Recipe):
    """How many bytes a model takes."""

    size: Annotated[int, Field(ge=1)]


@law(
    "files.room",
    "What the disk has no room for is refused before anything is written.",
    needs=["check_room"],
    oracle="no disk takes 10^17 bytes; every one that can run this takes one",
    cases=st.builds(DiskSpaceCase, size=st.sampled_from([1, 10**17])),
    examples=4,
)
def room_is_looked_for(trainer: Trainer, case: DiskSpaceCase) -> None:
    """It is asked with too much, and with next to nothing."""
    try:
        trainer.ask("check_room", Done, wanted=case.size)
        fits = True
    except RefusesError:
        fits = False
    check(fits is (case.size == 1), expected=f"{case.size} bytes to fit: {case.size == 1}", got=fits)
