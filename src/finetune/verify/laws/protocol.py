"""Laws of the protocol: a subject answers as it says, before other laws are judged by its answers."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from finetune.records import Outcome
from finetune.verify.catalogue import Law, add
from finetune.verify.check import LawFailure, check
from finetune.verify.client import SubjectClient
from finetune.verify.results import LawResult
from finetune.verify.subjects.answers import ANSWERS, Reply
from finetune.verify.subjects.subject import RefusesError, Subject, SubjectError, UnsupportedError
from finetune_strategies.cases.rows import PLAIN, TINY

Opener = Callable[[Path], AbstractContextManager[Subject]]
_ROWS = [{"prompt": "ab", "completion": "xyz"}, {"prompt": "a", "completion": "z"}]
_BATCH = [{"ids": [9, 40, 77, 15], "targets": [False, False, True, True]}]
_PROMPTS = [[9, 40, 77], [15]]
_TALK = [{"role": "user", "content": "ab"}]
_SETTINGS = {
    **PLAIN,
    "training.batch_size": 1,
    "training.epochs": 1.0,
    "training.max_steps": 2,
    "training.save_every": 1,
}
_ALIKE = ("render", "tokenize", "batches", "loss", "gradient", "evaluate", "generate")
"""Abilities whose answers name no files: asked twice, they answer alike."""
_FILES = ("file", "folder", "adapter")
_STATEMENTS = {
    "protocol.hello": "It says who it is: its name, the versions of what computes, and what it can and cannot.",
    "protocol.stranger": "It says of what it does not know that it has nothing of the kind, and goes on.",
    "protocol.alike": "Asked the same twice, it answers alike.",
    "protocol.inside": "It changes nothing beside the folders that it is given.",
    "protocol.leaves": "When it is closed, nothing that it has started runs on.",
}
_ABILITIES = (
    *("configure", "render", "tokenize", "batches", "loss", "gradient", "evaluate", "initial_adapter", "logits"),
    *("generate", "train", "resume", "adapter_weights", "merge"),
)
"""Those that there is a small question for."""
_STATEMENTS |= {
    f"protocol.{ability}": f"It can {ability}, as it says; numbers are numbers, and files that it names are there."
    for ability in _ABILITIES
}
for _id, _statement in _STATEMENTS.items():
    add(Law(_id, _statement, (), "the protocol, as `subjects.answers` has it"))


def conform(
    open_subject: Opener, scratch: Path, tell: Callable[[LawResult], None] = lambda result: None
) -> tuple[LawResult, ...]:
    """Judge a subject by each sentence of the protocol that can be seen from outside; nothing that it does raises here.

    What is watched for changes is `scratch`, but for the folder that the subject lives in and those that it is given to
    write to: the model and the files beside them. What happens elsewhere on the machine is not seen.

    Args:
        open_subject: opens it; it lives in the folder that it is given.
        scratch: an empty folder that exists.
    """
    found: list[LawResult] = []

    def judged(id: str, ask: Callable[[], object]) -> None:
        found.append(_judged(id, ask))
        tell(found[-1])

    own = scratch / "subject"
    own.mkdir()
    try:
        with open_subject(own) as subject:
            for id, ask in _asks(subject, scratch):
                judged(id, ask)
    except SubjectError as error:
        trouble = str(error)

        def fail() -> None:
            raise SubjectError(trouble)

        judged("protocol.hello", fail)
        return tuple(found)
    left = getattr(subject, "left_running", [])
    running = f"still running: {'; '.join(left)}"
    judged("protocol.leaves", lambda: check(not left, expected="nothing is left", got=running))
    return tuple(found)


def _asks(subject: Subject, scratch: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each check with its id, in the order in which they are done."""
    folder = scratch / "asked"
    folder.mkdir()
    (scratch / "beside.txt").write_text("nothing here is the trainer's\n", encoding="utf-8")
    trainer = SubjectClient(subject, folder)
    questions = _Questions(trainer, scratch / "given")
    before = _bytes_of(scratch)
    yield "protocol.hello", lambda: _hold_hello(subject)
    for ability in questions.known:
        if not subject.about.abilities.get(ability, "missing"):
            yield f"protocol.{ability}", partial(_hold_answer, questions, ability)
    yield "protocol.alike", lambda: _hold_alike(questions)
    yield "protocol.stranger", lambda: _hold_stranger(subject)
    yield "protocol.inside", lambda: _hold_unchanged(before, _bytes_of(scratch))


class _Questions:
    """A small question for each ability, and the answers that there were."""

    def __init__(self, trainer: SubjectClient, given: Path) -> None:
        given.mkdir()
        self.trainer = trainer
        self.given = given
        self.model = trainer.model(TINY)
        self.answers: dict[str, Reply] = {}
        base: dict[str, Any] = {"model": self.model, "settings": _SETTINGS}
        self.known: dict[str, Callable[[], Mapping[str, Any]]] = {
            "configure": lambda: base,
            "render": lambda: {**base, "messages": _TALK, "prompt": True},
            "tokenize": lambda: {**base, "rows": _ROWS},
            "batches": lambda: {**base, "rows": _ROWS, "epochs": 1},
            "loss": lambda: {**base, "batch": _BATCH},
            "gradient": lambda: {**base, "micro": [_BATCH]},
            "evaluate": lambda: {**base, "rows": _ROWS},
            "initial_adapter": lambda: base,
            "logits": lambda: {**base, "prompts": _PROMPTS},
            "generate": lambda: {**base, "prompts": _PROMPTS},
            "train": lambda: {**base, "rows": _ROWS, "folder": given / "whole"},
            "resume": self._stopped,
            "adapter_weights": lambda: {"model": self.model, "adapter": self._adapter()},
            "merge": lambda: {**base, "adapter": self._adapter()},
        }

    def ask(self, ability: str) -> Reply:
        return self.trainer.ask(ability, ANSWERS[ability], **self.known[ability]())

    def _stopped(self) -> Mapping[str, Any]:
        folder = self.given / "stopped"
        settings = {"model": self.model, "settings": _SETTINGS, "rows": _ROWS, "folder": folder, "stop_after": 1}
        self.trainer.ask("train", ANSWERS["train"], **settings)
        return {"folder": folder}

    def _adapter(self) -> str:
        trained = self.answers.get("train")
        if trained is None:
            raise UnsupportedError("nothing was trained that could be asked about")
        return str(trained.model_dump()["adapter"])


def _judged(id: str, ask: Callable[[], object]) -> LawResult:
    began = time.monotonic()
    outcome = Outcome.PASSED
    evidence: dict[str, Any] = {}
    try:
        ask()
    except LawFailure as broken:
        outcome, evidence = Outcome.FAILED, {"expected": broken.expected, "got": broken.got}
    except UnsupportedError as error:
        outcome, evidence = (
            Outcome.FAILED,
            {"expected": "what it says that it can", "got": f"it has nothing of the kind: {error}"},
        )
    except (RefusesError, SubjectError) as error:
        outcome, evidence = Outcome.ERROR, {"why": str(error)}
    # A subject of the user's own may raise anything.
    except Exception as error:
        outcome, evidence = Outcome.ERROR, {"why": f"{type(error).__name__}: {error}"}
    return LawResult(id, _STATEMENTS[id], outcome, cases=1, seconds=round(time.monotonic() - began, 3), **evidence)


def _hold_hello(subject: Subject) -> None:
    about = subject.about
    check(about.name.strip(), expected="a name", got=about.name)
    check(about.versions, expected="the version of at least one thing that computes", got=about.versions)
    check(any(not why for why in about.abilities.values()), expected="at least one ability", got=about.abilities)


def _hold_answer(questions: _Questions, ability: str) -> None:
    answer = questions.ask(ability)
    plain = answer.model_dump()
    odd = [f"{place} is {number}" for place, number in _numbers(plain) if not math.isfinite(number)]
    check(not odd, expected="numbers", got="; ".join(odd[:5]))
    absent = [plain[key] for key in _FILES if plain.get(key) is not None and not Path(plain[key]).exists()]
    check(not absent, expected="files that are there", got=f"it names {', '.join(map(str, absent))}, which is not")
    questions.answers[ability] = answer


def _hold_alike(questions: _Questions) -> None:
    for ability in _ALIKE:
        if ability in questions.answers:
            first, second = questions.answers[ability], questions.ask(ability)
            check(first == second, expected=f"{ability}: {first}", got=f"{ability}: {second}")
    if "logits" in questions.answers:
        before, after = (
            questions.trainer.tensors(answer.model_dump()["file"])
            for answer in (questions.answers["logits"], questions.ask("logits"))
        )
        same = before.keys() == after.keys() and all(np.array_equal(before[key], after[key]) for key in before)
        check(same, expected="the same logits", got="others")


def _hold_stranger(subject: Subject) -> None:
    try:
        answer = subject.ask("fly", {})
    except UnsupportedError:
        return
    check(False, expected="it has nothing of the kind", got=f"it says that it can fly: {answer}")  # noqa: FBT003


def _hold_unchanged(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    names = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    words = [
        f"{name} is {'new' if name not in before else 'gone' if name not in after else 'another'}"
        for name in sorted(names)
    ]
    check(not words, expected="every file beside its folders as it was", got="; ".join(words))


def _numbers(value: object, place: str = "") -> Iterator[tuple[str, float]]:
    """Every float within, by its place."""
    if isinstance(value, float):
        yield place, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _numbers(each, f"{place}.{key}".strip("."))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _numbers(each, f"{place}[{number}]")


def _bytes_of(scratch: Path) -> dict[str, str]:
    """What is in each file that is none of the trainer's."""
    theirs = (scratch / "subject", scratch / "given")
    return {
        path.relative_to(scratch).as_posix(): sha256(path.read_bytes()).hexdigest() if path.is_file() else "a folder"
        for path in sorted(scratch.rglob("*"))
        if not any(path.is_relative_to(own) for own in theirs)
    }
