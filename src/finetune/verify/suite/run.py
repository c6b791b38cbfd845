"""Holds a trainer to all laws up to a tier, cheapest first; what one law comes to never stops the others."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from platform import machine, python_version, system
from typing import Any

from finetune.errors import UsageError
from finetune.verify.confine import confined_to
from finetune.verify.doors.door import SubjectError
from finetune.verify.doors.late import reference_oracle
from finetune.verify.recipes import Recipe
from finetune.verify.suite.catalogue import CaseLaw, case_laws
from finetune.verify.suite.chance import broken_by_holm
from finetune.verify.suite.conformance import conform
from finetune.verify.suite.judge import Effort, judge, judge_again
from finetune.verify.suite.subjects import running_subject
from finetune.verify.suite.trainer import Trainer
from finetune.verify.suite.verdicts import LawResult, Word

FORMAT = "finetune verification"
VERSION = 1
Teller = Callable[[LawResult], None]


@dataclass(frozen=True, slots=True)
class Verification:
    """What all laws came to, with all that is needed to have it again."""

    subject: str
    versions: Mapping[str, str]
    tier: int
    effort: Effort
    judgements: tuple[LawResult, ...]
    seconds: float
    trespasses: tuple[str, ...] = ()
    machine: str = field(default_factory=lambda: f"{system()} {machine()}, Python {python_version()}")

    def after(self, conduct: Sequence[LawResult]) -> "Verification":
        """The same, with what was judged before."""
        seconds = round(self.seconds + sum(each.seconds for each in conduct), 3)
        return replace(self, judgements=(*conduct, *self.judgements), seconds=seconds)

    def before(self, more: Sequence[LawResult]) -> "Verification":
        """The same, with what was judged after it."""
        seconds = round(self.seconds + sum(each.seconds for each in more), 3)
        return replace(self, judgements=(*self.judgements, *more), seconds=seconds)

    @property
    def counts(self) -> dict[Word, int]:
        """How many laws came to each word."""
        words: tuple[Word, ...] = ("holds", "broken", "undecided", "error", "not applicable")
        return {word: sum(each.word == word for each in self.judgements) for word in words}

    @property
    def passes(self) -> bool:
        """Whether laws were judged, beside those of the protocol, and all of them hold."""
        counts = self.counts
        bad = counts["broken"] + counts["error"] + counts["undecided"]
        judged = any(each.word == "holds" and not each.law.startswith("door.") for each in self.judgements)
        return judged and not bad and not self.trespasses

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "subject": self.subject,
            "versions": dict(self.versions),
            "suite": version("finetune-suite"),
            "machine": self.machine,
            "tier": self.tier,
            "seed": self.effort.seed,
            "times": self.effort.times,
            "outcome": "holds" if self.passes else "broken",
            "counts": dict(self.counts),
            "seconds": self.seconds,
            "trespasses": list(self.trespasses),
            "laws": [each.as_dict() for each in self.judgements],
        }


def chosen_laws(tier: int, ids: Iterable[str] = ()) -> tuple[CaseLaw, ...]:
    """The laws up to a tier, or those of them that are named.

    Raises:
        UsageError: there is no law of such a name in this tier.
    """
    known = case_laws(tier)
    names = list(dict.fromkeys(ids)) or list(known)
    if unknown := [name for name in names if name not in known]:
        whole = case_laws()
        told = ", ".join(f"{name!r} (of tier {whole[name].tier})" if name in whole else repr(name) for name in unknown)
        higher = [whole[name].tier for name in unknown if name in whole]
        hint = f"say --tier {max(higher)}" if higher else f"choose from: {', '.join(known)}"
        raise UsageError(f"there is no law {told} up to tier {tier}", hint=hint)
    return tuple(known[name] for name in names)


def verify(
    trainer: Trainer, laws: Iterable[CaseLaw], effort: Effort, *, tier: int = 1, tell: Teller = lambda judgement: None
) -> Verification:
    """Judge every law; each is told as soon as it is judged, and before the next one is asked for."""
    began, found = time.monotonic(), []
    for law in laws:
        judgement = _judged(law, trainer, effort)
        tell(judgement)
        found.append(judgement)
    about = trainer.subject.about
    seconds = round(time.monotonic() - began, 3)
    return Verification(about.name, about.versions, tier, effort, _with_chance(found), seconds)


def _with_chance(judgements: Sequence[LawResult]) -> tuple[LawResult, ...]:
    """The judgements, those that chance has a hand in decided together, so that the whole suite rarely errs."""
    alarms = {each.law: each.false_alarm for each in judgements if each.false_alarm is not None}
    broken = broken_by_holm(alarms)
    return tuple(
        replace(each, word="broken")
        if each.law in broken
        else replace(each, case=None, expected="", got="")
        if each.false_alarm is not None
        else each
        for each in judgements
    )


def _judged(law: CaseLaw, trainer: Trainer, effort: Effort) -> LawResult:
    try:
        return judge(law, trainer, effort)
    # A law that fails itself says nothing about the trainer, and the others can still be judged.
    except Exception as error:
        why = f"the suite itself failed: {type(error).__name__}: {error}"
        return LawResult(law.id, law.law.statement, "error", why=why)


def verify_subject(
    name: str,
    laws: Iterable[CaseLaw],
    effort: Effort,
    *,
    tier: int = 1,
    python: str | None = None,
    tell: Teller = lambda judgement: None,
) -> Verification:
    """Open a subject by its name, judge every law, and see what it left running.

    Raises:
        UsageError, MissingExtraError: there is no such subject, or it is not installed.
        SubjectError: it cannot even be started.
    """
    chosen = tuple(laws)
    effort = replace(effort, chances=max(1, sum(law.chance is not None for law in chosen)))
    with opened_trainer(name, python) as trainer:
        found = verify(trainer, chosen, effort, tier=tier, tell=tell)
    left = getattr(trainer.subject, "left_running", [])
    return replace(found, trespasses=tuple(f"left running when it was closed: {command}" for command in left))


def judge_conduct(
    name: str, *, python: str | None = None, tell: Teller = lambda judgement: None
) -> tuple[LawResult, ...]:
    """Open a subject by its name, and judge how it keeps to the protocol.

    Raises:
        UsageError, MissingExtraError: there is no such subject, or it is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-conduct-") as place:
        return conform(lambda folder: running_subject(name, folder, python=python), Path(place), tell)


def judge_subject_again(name: str, law: CaseLaw, case: Recipe, *, python: str | None = None) -> LawResult:
    """Hold a subject, opened by its name, to one law in one case.

    Raises:
        UsageError, MissingExtraError: there is no such subject, or it is not installed.
    """
    try:
        with opened_trainer(name, python) as trainer, confined_to(trainer.scratch, name):
            return judge_again(law, trainer, case)
    except SubjectError as error:
        return LawResult(law.id, law.law.statement, "error", why=str(error))


@contextlib.contextmanager
def opened_trainer(name: str, python: str | None = None) -> Iterator[Trainer]:
    """A subject by its name with an oracle and a scratch folder, for as long as this is open.

    Raises:
        UsageError, MissingExtraError: there is no such subject, or it is not installed.
        SubjectError: it cannot even be started.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-verify-") as place, contextlib.ExitStack() as ends:
        scratch = Path(place)
        oracle = reference_oracle(scratch / "oracle")
        ends.callback(oracle.close)
        with running_subject(name, scratch, python=python) as door:
            yield Trainer(door, scratch, oracle)
