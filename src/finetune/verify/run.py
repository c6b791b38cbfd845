"""Holds a trainer to all laws up to a tier, cheapest first; what one law comes to never stops the others."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from platform import machine, python_version, system
from typing import Any

from finetune.errors import UsageError
from finetune.records import Outcome
from finetune.verify.catalogue import Law, case_laws, catalogue
from finetune.verify.client import SubjectClient
from finetune.verify.confine import confined_to
from finetune.verify.judge import Effort, judge, judge_again
from finetune.verify.laws.protocol import conform
from finetune.verify.results import LawResult
from finetune.verify.subjects.choose import running_subject
from finetune.verify.subjects.process import reference_oracle
from finetune.verify.subjects.subject import SubjectError
from finetune_strategies.recipes import Recipe

FORMAT = "finetune verification"
VERSION = 2
Teller = Callable[[LawResult], None]
BAD = (Outcome.FAILED, Outcome.ERROR, Outcome.INCONCLUSIVE)
"""Outcomes of a law that does not hold, or could not be judged."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What all laws came to, with all that is needed to have it again.

    Attributes:
        known: the laws that do not hold and did not hold in the baseline either; they fail nothing.
        gone: the laws that hold and did not in the baseline.
    """

    subject: str
    versions: Mapping[str, str]
    tier: int
    effort: Effort
    results: tuple[LawResult, ...]
    seconds: float
    trespasses: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    machine: str = field(default_factory=lambda: f"{system()} {machine()}, Python {python_version()}")

    def after(self, conduct: Sequence[LawResult]) -> "Verification":
        """The same, with what was judged before."""
        seconds = round(self.seconds + sum(each.seconds for each in conduct), 3)
        return replace(self, results=(*conduct, *self.results), seconds=seconds)

    @property
    def counts(self) -> dict[Outcome, int]:
        """How many laws came to each outcome."""
        return {outcome: sum(each.outcome == outcome for each in self.results) for outcome in Outcome}

    @property
    def passes(self) -> bool:
        """Whether laws were judged, beside those of the protocol, and all of them hold."""
        bad = any(each.outcome in BAD and each.law not in self.known for each in self.results)
        judged = any(each.outcome == Outcome.PASSED and not each.law.startswith("protocol.") for each in self.results)
        return judged and not bad and not self.trespasses

    def held_to(self, baseline: Mapping[str, str]) -> "Verification":
        """The same, with what a baseline knew: the outcome of each law that did not hold then."""
        known = [each.law for each in self.results if each.outcome in BAD and baseline.get(each.law) == each.outcome]
        gone = [each.law for each in self.results if each.outcome == Outcome.PASSED and each.law in baseline]
        return replace(self, known=tuple(known), gone=tuple(gone))

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
            "outcome": Outcome.of(self.passes),
            "counts": dict(self.counts),
            "seconds": self.seconds,
            "trespasses": list(self.trespasses),
            "known": list(self.known),
            "gone": list(self.gone),
            "laws": [each.as_dict() for each in self.results],
        }


def chosen_laws(tier: int, ids: Iterable[str] = (), exclude: Iterable[str] = ()) -> tuple[Law, ...]:
    """The laws up to a tier, or those of them that are named, without those that are excluded.

    Raises:
        UsageError: there is no law of such a name in this tier.
    """
    known, out = case_laws(tier), set(exclude)
    names = list(dict.fromkeys(ids)) or list(known)
    whole = case_laws()
    protocol = {id for id, law in catalogue().items() if law.subject == "protocol"}
    unknown = [name for name in names if name not in known] + sorted(out - whole.keys() - protocol)
    if unknown:
        missing = ", ".join(
            f"{name!r} (of tier {whole[name].tier})" if name in whole else repr(name) for name in unknown
        )
        higher = [whole[name].tier for name in unknown if name in whole]
        near = [word for name in unknown for word in get_close_matches(name, [*whole, *protocol], n=1)]
        hint = f"did you mean {', '.join(near)}?" if near else "`ft verify --list` has the laws"
        hint = f"say --tier {max(higher)}" if higher else hint
        raise UsageError(f"there is no law {missing} up to tier {tier}", hint=hint)
    return tuple(known[name] for name in names if name not in out)


def verify(
    trainer: SubjectClient, laws: Iterable[Law], effort: Effort, *, tier: int = 1, tell: Teller = lambda result: None
) -> Verification:
    """Judge every law; each is told as soon as it is judged, and before the next one is asked for."""
    began, found = time.monotonic(), []
    for law in laws:
        result = _judged(law, trainer, effort)
        tell(result)
        found.append(result)
    about = trainer.subject.about
    seconds = round(time.monotonic() - began, 3)
    return Verification(about.name, about.versions, tier, effort, tuple(found), seconds)


def _judged(law: Law, trainer: SubjectClient, effort: Effort) -> LawResult:
    try:
        return judge(law, trainer, effort)
    # A law that fails itself says nothing about the trainer, and the others can still be judged.
    except Exception as error:
        why = f"the suite itself failed: {type(error).__name__}: {error}"
        return LawResult(law.id, law.statement, Outcome.ERROR, why=why)


def verify_subject(
    name: str,
    laws: Iterable[Law],
    effort: Effort,
    *,
    tier: int = 1,
    python: str | None = None,
    tell: Teller = lambda result: None,
) -> Verification:
    """Open a subject by its name, judge every law, and see what it left running.

    Raises:
        UsageError, MissingExtraError: there is no such subject, or it is not installed.
        SubjectError: it cannot even be started.
    """
    with opened_trainer(name, python) as trainer:
        found = verify(trainer, laws, effort, tier=tier, tell=tell)
    left = getattr(trainer.subject, "left_running", [])
    return replace(found, trespasses=tuple(f"left running when it was closed: {command}" for command in left))


def judge_conduct(name: str, *, python: str | None = None, tell: Teller = lambda result: None) -> tuple[LawResult, ...]:
    """Open a subject by its name, and judge how it keeps to the protocol.

    Raises:
        UsageError, MissingExtraError: there is no such subject, or it is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-conduct-") as place:
        return conform(lambda folder: running_subject(name, folder, python=python), Path(place), tell)


def judge_subject_again(name: str, law: Law, case: Recipe, *, python: str | None = None) -> LawResult:
    """Hold a subject, opened by its name, to one law in one case.

    Raises:
        UsageError, MissingExtraError: there is no such subject, or it is not installed.
    """
    try:
        with opened_trainer(name, python) as trainer, confined_to(trainer.scratch, name):
            return judge_again(law, trainer, case)
    except SubjectError as error:
        return LawResult(law.id, law.statement, Outcome.ERROR, why=str(error))


@contextlib.contextmanager
def opened_trainer(name: str, python: str | None = None) -> Iterator[SubjectClient]:
    """A subject by its name with an oracle and a scratch folder, for as long as this is open.

    Raises:
        UsageError, MissingExtraError: there is no such subject, or it is not installed.
        SubjectError: it cannot even be started.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-verify-") as place, contextlib.ExitStack() as ends:
        scratch = Path(place)
        oracle = reference_oracle(scratch / "oracle")
        ends.callback(oracle.close)
        with running_subject(name, scratch, python=python) as subject:
            yield SubjectClient(subject, scratch, oracle)
