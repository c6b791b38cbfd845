"""Laws of whole runs: where they end, by which rates, from which seed, and what is kept of them."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from finetune.models.locate import locate_model
from finetune.verify.catalogue import law, oracle
from finetune.verify.check import check
from finetune.verify.client import SubjectClient
from finetune.verify.laws.helpers import adapter_of, marks, refused, same_course, tokenized, train, weights_of
from finetune.verify.subjects.answers import Generated, Loss, TokenRows, TrainingResult, Weights
from finetune.verify.subjects.subject import UnsupportedError
from finetune_strategies.cases import train as cases
from finetune_strategies.cases.learned import QUICK
from finetune_strategies.cases.rows import PLAIN, TINY, Rows

SMALL_MODEL = "reference-llama"
"""The shipped model: small, and it has learned to read."""

LEARNING = {
    **PLAIN,
    "template.name": "tokenizer",
    "adapter.rank": 8,
    "adapter.alpha": 16.0,
    "training.epochs": 120.0,
    "training.batch_size": 2,
    "training.learning_rate": 0.001,
    "training.schedule": "constant",
    "training.warmup_fraction": 0.0,
    "evaluation.max_new_tokens": 12,
}


@law("learning.by_heart", ["tokenize", "train", "generate"], cases.LEARNING_BY_HEART, examples=1, tier=2, cost=30)
@oracle(
    "the answers that were trained on, of which the shipped model knows none; a sound trainer teaches nine "
    "lessons in ten, and one of 199 such has fewer than five of eight"
)
def what_was_learned_is_answered(trainer: SubjectClient, case: cases.Lessons) -> None:
    """What was trained on again and again is answered, word for word, and then the model stops."""
    wrong = [lesson for rows in case.lessons if (lesson := _mistake(trainer, rows)) is not None]
    right = len(case.lessons) - len(wrong)
    check(right >= case.least, expected=f"{case.least} lessons of {len(case.lessons)}", got=f"{right}; not {wrong}")


def _mistake(trainer: SubjectClient, values: list[dict[str, str]]) -> tuple[list[int], list[int]] | None:
    """The first answer that is not what was taught, after that; None where all are."""
    model: Any = locate_model(SMALL_MODEL).folder
    given = {"model": model, "settings": LEARNING}
    rows = trainer.ask("tokenize", TokenRows, rows=values, **given).rows
    course = trainer.ask("train", TrainingResult, rows=values, folder=trainer.folder() / "run", **given)
    prompts = [row.ids[: row.targets.index(True)] for row in rows]
    said = trainer.ask("generate", Generated, prompts=prompts, adapter=course.adapter, **given).answers
    for row, answer in zip(rows, said, strict=True):
        taught = [token for token, target in zip(row.ids, row.targets, strict=True) if target]
        # What ends an answer is taught, and left out of what is said.
        begun = answer and taught[: len(answer)] == answer
        if not begun or len(taught) - len(answer) not in (1, 2):
            return taught, answer
    return None


@law("train.oracle", ["train", "tokenize", "initial_adapter", "adapter_weights"], cases.COURSES, examples=8, cost=4)
@oracle("the same run in float64, from the adapter that the trainer begins with, where rows are the same tokens")
def training_moves_as_it_should(trainer: SubjectClient, case: cases.Whole) -> None:
    """Training moves the adapter as its settings say: batches, accumulation, rate, decay and clipping together."""
    given: dict[str, Any] = {"model": trainer.model(case.model), "settings": case.settings}
    model = trainer.model(case.model)
    mine, theirs = (tokenized(each, model, case.values, case.settings).rows for each in (trainer.oracle, trainer))
    if [(row.ids, row.targets) for row in mine] != [(row.ids, row.targets) for row in theirs]:
        raise UnsupportedError("it makes other tokens, or other targets, of these rows than the oracle")
    start = trainer.ask("initial_adapter", Weights, **given)
    course = train(trainer, rows=case.values, **given)
    wanted = trainer.oracle.ask("train_from", TrainingResult, rows=case.values, file=start.file, **given)
    same_course(trainer, given["model"], start.file, course, wanted)


@law("train.tail", ["train", "initial_adapter", "adapter_weights"], cases.TRAIN_TAIL, examples=4, cost=4)
@oracle("the same run in float64; all rows are alike, so that their order says nothing")
def tail_is_a_step(trainer: SubjectClient, case: cases.Whole) -> None:
    """The batches that are left over at the end of an epoch make a step like any other, weighed by their own tokens."""
    training_moves_as_it_should(trainer, case)


@law("seed.decides", ["train", "initial_adapter", "adapter_weights"], cases.SEED_DECIDES, examples=3, cost=3)
@oracle("the run itself, once more")
def seed_decides(trainer: SubjectClient, case: cases.Seeds) -> None:
    """The same seed makes the same adapter, from the beginning to the end; another seed another one; 0 is a seed."""
    model = trainer.model(TINY)

    def begin(seed: int) -> Any:
        given = {"model": model, "settings": {**QUICK, "training.seed": seed}}
        return trainer.tensors(trainer.ask("initial_adapter", Weights, **given).file)

    def end() -> Any:
        settings = {**QUICK, "training.seed": case.seed, "adapter.dropout": 0.3, "training.batch_size": 1}
        return weights_of(trainer, model, adapter_of(train(trainer, model, settings, case.values)))[1]

    for what, (once, again) in {"beginning": (begin(case.seed), begin(case.seed)), "end": (end(), end())}.items():
        same = once.keys() == again.keys() and all(np.array_equal(once[name], again[name]) for name in once)
        check(same, expected=f"one {what} with seed {case.seed}", got="two different ones")
    one, other = begin(case.seed), begin(case.other)
    alike = all(np.array_equal(one[name], other[name]) for name in one)
    check(not alike, expected=f"another beginning with seed {case.other}", got="the same one")


@law("runs.untouched", ["train"], cases.RUNS_UNTOUCHED, examples=2, cost=3)
@oracle("the bytes of its adapter before and after")
def earlier_run_is_left_alone(trainer: SubjectClient, case: Rows) -> None:
    """What a run has made stays as it is, whatever runs come after it."""
    given = {"model": trainer.model(TINY), "rows": case.values, "folder": trainer.folder() / "run"}
    settings = {**QUICK, "training.batch_size": 1}
    adapter = Path(adapter_of(trainer.ask("train", TrainingResult, settings=settings, **given)))
    before = marks(adapter)
    again = {**settings, "training.seed": 5}
    refused(lambda: trainer.ask("train", TrainingResult, settings=again, **given))
    check(marks(adapter) == before, expected="the first run's adapter as it was", got="another one in its place")


@law("keep.best", ["train", "evaluate"], cases.KEEP_BEST, examples=2, cost=8)
@oracle("the same run ended after each step, each looked at")
def best_step_is_kept(trainer: SubjectClient, case: cases.Best) -> None:
    """A run that is to keep its best step ends with the step whose held-out loss was lowest."""
    model, watched = trainer.model(TINY), [case.watched.model_dump()]
    file = trainer.folder() / "valid.jsonl"
    file.write_text(case.watched.model_dump_json() + "\n", encoding="utf-8")
    settings = {**QUICK, "training.learning_rate": case.rate, "training.epochs": 4.0, "training.save_every": 1}
    settings |= {"data.valid": str(file), "training.evaluate_every": 1}

    def look(**more: object) -> float:
        adapter = adapter_of(train(trainer, model, {**settings, **more}, case.values))
        return trainer.ask("evaluate", Loss, model=model, settings=QUICK, rows=watched, adapter=adapter).loss

    looks = [look(**{"training.max_steps": steps}) for steps in (1, 2, 3, 4)]
    kept = look(**{"training.load_best_model": True})
    check(abs(kept - min(looks)) <= 1e-4 * (1 + kept), expected=f"the lowest of {looks}", got=kept)


_PEAK = 3e-4


def _rate(case: cases.Scheduled, step: float, total: int) -> float:
    """The rate at a step, from 0; warm-up ends at the peak and the rest ends near zero."""
    if step <= case.warmup:
        return _PEAK * max(step, 0.0) / case.warmup if case.warmup else _PEAK
    done = min(1.0, (step - case.warmup) / (total - case.warmup))
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return _PEAK * shapes[case.schedule]


@law("schedule.closed_form", ["train"], cases.SCHEDULE_CLOSED_FORM, examples=5, cost=4)
@oracle("the schedule's formula at the step and at its neighbours: trainers count from 0 or from 1")
def rate_follows_its_schedule(trainer: SubjectClient, case: cases.Scheduled) -> None:
    """The learning rate follows its schedule over optimizer steps: it warms up, and it comes down by the last one."""
    settings = {
        **QUICK,
        "training.batch_size": 1,
        "training.gradient_accumulation_steps": case.accumulation,
        "training.epochs": float(case.epochs),
        "training.learning_rate": _PEAK,
        "training.schedule": case.schedule,
        "training.warmup_fraction": case.warmup / case.steps,
    }
    steps = train(trainer, trainer.model(TINY), settings, case.values).steps
    check([step.step for step in steps] == [*range(1, case.steps + 1)], expected=f"{case.steps} steps", got=len(steps))
    for step in steps:
        if step.learning_rate is None:
            continue
        near = [_rate(case, step.step + shift, case.steps) for shift in (-1, 0, 1)]
        holds = min(near) * (1 - 1e-3) - 1e-12 <= step.learning_rate <= max(near) * (1 + 1e-3)
        check(holds, expected=f"step {step.step}: {near[0]:.6g} to {near[-1]:.6g}", got=f"{step.learning_rate:.6g}")


@law("train.moves", ["train", "initial_adapter", "adapter_weights"], cases.TRAIN_MOVES, examples=5, cost=2)
@oracle("the adapter that training begins with")
def every_trained_tensor_moves(trainer: SubjectClient, case: cases.Moved) -> None:
    """Every tensor that is trained is another after two steps, whatever the format that its base computes in."""
    given: dict[str, Any] = {"model": trainer.model(case.model), "settings": case.settings}
    start = trainer.tensors(trainer.ask("initial_adapter", Weights, **given).file)
    _, end = weights_of(trainer, given["model"], adapter_of(train(trainer, rows=case.values, **given)))
    still = sorted(name for name, tensor in start.items() if name in end and np.array_equal(tensor, end[name]))
    check(not still, expected=f"all of {len(start)} tensors moved", got=f"as they were: {still[:3]} ({len(still)})")


@law("train.undisturbed", ["train", "adapter_weights"], cases.TRAIN_UNDISTURBED, examples=4, cost=3)
@oracle("the same run without checkpoints and without a look at held-out rows on its way")
def looking_and_saving_change_nothing(trainer: SubjectClient, case: cases.Watched) -> None:
    """To save checkpoints and to look at held-out losses on the way changes nothing of what is learned."""
    model, file = trainer.model(TINY), trainer.folder() / "valid.jsonl"
    file.write_text(case.watched.model_dump_json() + "\n", encoding="utf-8")
    settings = {**QUICK, "training.seed": case.seed, "adapter.dropout": 0.3}
    disturbed: dict[str, Any] = {"training.save_every": 1}
    disturbed |= {"training.evaluate_every": 1, "data.valid": str(file)} if case.looks else {}
    ends = [
        weights_of(trainer, model, adapter_of(train(trainer, model, {**settings, **more}, case.values)))[1]
        for more in ({}, disturbed)
    ]
    odd = [name for name, tensor in ends[0].items() if not np.allclose(tensor, ends[1][name], rtol=1e-4, atol=1e-7)]
    check(not odd, expected="the adapter of the run that nothing disturbed", got=f"another {odd[:1]}")
