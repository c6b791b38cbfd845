"""The laws that stories are held to, each with an id and one sentence: the only place where they stand."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

_MOST = 600
"""Letters of evidence that a finding quotes; more would hide it."""


@dataclass(frozen=True, slots=True)
class Law:
    """A sentence that holds for every subject with the ability it is about."""

    id: str
    statement: str
    ability: str


_TRAINS = {
    "run.ends": "A run that nothing disturbs comes to its end.",
    "run.says-so": "However a process ends, it says so in words and never with a traceback.",
    "run.code": "The exit code tells how a process ended.",
    "run.full-disk": "On a full disk a run says what it cannot write.",
    "run.last-words": "An interrupted run says which checkpoint is intact and how to go on, and so it is.",
    "checkpoints.outlive": "No death costs a checkpoint that was complete before it.",
    "checkpoints.whole": "Every checkpoint that is listed as complete is whole.",
    "checkpoints.logged": "No checkpoint is of a later step than the last one that the log tells of.",
    "checkpoints.damage-found": "Exactly the checkpoint that was damaged is called damaged.",
    "resume.newest": "A run goes on from its newest complete checkpoint.",
    "resume.refuses-damaged": "A run does not go on from a damaged checkpoint: it is refused by its name.",
    "resume.refuses-changed": "With a setting changed that changes weights no run goes on: it is refused by its name.",
    "refuse.what-cannot-be": "To begin twice, resume what is finished or never begun, or measure too early is refused.",
    "refuse.touches-nothing": "What is refused is refused with a hint, and all stays as it is.",
    "course.same": "What the log tells of training is, at every moment, how an undisturbed run begins.",
    "result.whole": "No file of a finished run is other than the run says.",
    "result.damage-found": "Exactly the file of a finished run that was damaged is called damaged.",
    "measure.refuses-damaged": "What was trained is not measured once it is damaged, and the file is named.",
    "measure.same": "A finished run measures as one that nobody disturbed.",
    "end.course": "However often it was ended, a finished run tells all that an undisturbed one tells.",
    "end.files": "However often it was ended, a run ends with the same bytes.",
    "end.names": "However often it was ended, a run leaves the same files and no more.",
    "end.record": "However often it was ended, a run says the same of itself.",
}
_KEEPS = {
    "store.code": "A process that was left alone does all that it was told, and one that died did so as it was to.",
    "store.full-disk": "On a full disk a store says what it cannot write.",
    "store.answers": "What was done is answered with nothing.",
    "store.opens-whole": "What is whole is opened, and holds what was put there.",
    "store.refuses-damaged": "What is damaged or gone is never opened: it is refused by its name, with what to do.",
    "store.outlives": "No death costs a checkpoint that must stay, and none comes from nowhere.",
    "store.reads-only": "To open changes nothing.",
    "store.lists": "Exactly what must be there is listed.",
    "store.damage-found": "Exactly what is damaged is called so, by its name.",
}
LAWS: Mapping[str, Law] = {
    law.id: law
    for ability, laws in (("Trains", _TRAINS), ("KeepsCheckpoints", _KEEPS))
    for law in (Law(id, statement, ability) for id, statement in laws.items())
}
"""Every law by its id."""


class LawBrokenError(AssertionError):
    """A subject broke a law: a finding, and no error of the suite's."""

    def __init__(self, law: Law, expected: str, got: str) -> None:
        super().__init__(f"{law.id}: {law.statement}\n  expected: {expected}\n  got: {got}")
        self.law = law
        self.expected = expected
        self.got = got


@cache
def _kind(law: str) -> type[LawBrokenError]:
    """One type for each law: Hypothesis tells failures apart by their type, and makes each of them small."""
    return type(f"LawBrokenError[{law}]", (LawBrokenError,), {})


def check_law(law: str, holds: object, *, expected: object, got: object) -> None:
    """Hold a subject to a law.

    Raises:
        LawBrokenError: it does not hold.
    """
    if not holds:
        raise _kind(law)(LAWS[law], short(expected), short(got))


def check_law_same(law: str, expected: Any, got: Any) -> None:
    """Hold a subject to a law of sameness; of mappings only what differs is told.

    Raises:
        LawBrokenError: the two differ.
    """
    if expected == got:
        return
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        differing = sorted(key for key in {*expected, *got} if expected.get(key) != got.get(key))
        expected, got = _part(expected, differing), _part(got, differing)
    check_law(law, False, expected=expected, got=got)  # noqa: FBT003  # the values speak


def _part(values: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: values[key] for key in keys if key in values}


def short(evidence: object) -> str:
    """Words as they are, from their end, where a program says why it ended; anything else from its beginning."""
    if isinstance(evidence, str):
        return evidence if len(evidence) <= _MOST else f"... {evidence[-_MOST:]}"
    told = repr(evidence)
    return told if len(told) <= _MOST else f"{told[:_MOST]} ..."
