"""Holds a trainer to one law: draws cases, makes a case that breaks it as small as time allows, and keeps it."""

import contextlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import reject as reject_case
from hypothesis.errors import Flaky, Unsatisfiable, UnsatisfiedAssumption

from finetune.records import Outcome
from finetune.verify.catalogue import Law
from finetune.verify.check import LawFailure
from finetune.verify.client import SubjectClient
from finetune.verify.results import LawResult
from finetune.verify.subjects.subject import RefusesError, SubjectError, UnsupportedError
from finetune_strategies.recipes import Recipe

_PHASES = (Phase.generate, Phase.shrink)
_EVERY = list(HealthCheck)
_SOMEWHERE = ".../"
"""Stands for a folder of the suite's."""
_MOST_UNABLE = 25
"""Cases that a trainer may have nothing for before the first that it has something for."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard a judge looks: a seed, how many times the cases of profile `fast`, and seconds at most for each part.

    A law that trains for seconds has five times as long.
    """

    seed: int = 0
    times: float = 1.0
    seconds: float = 60.0
    shrink_seconds: float = 30.0


class _Enough(BaseException):
    """Nothing more is to be found out here; it goes through Hypothesis as Ctrl-C would."""


@dataclass(slots=True)
class _CaseTally:
    """What was seen of one law so far; `plain` takes from words what depends on where the suite lies."""

    plain: Callable[[str], str]
    began: float = field(default_factory=time.monotonic)
    broke: float = 0.0
    cases: int = 0
    unable: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    smallest: tuple[Recipe, LawFailure] | None = None
    trouble: str = ""


def judge(law: Law, trainer: SubjectClient, effort: Effort) -> LawResult:
    """Hold a trainer to a law. No trouble of the trainer's raises here: it is in the result."""
    if why := trainer.lacks(*law.needs):
        return LawResult(law.id, law.statement, Outcome.NOT_APPLICABLE, why=why)
    assert law.cases is not None
    seen = _CaseTally(_plain(trainer))

    def once(case: Recipe) -> None:
        _judge_case(law, trainer, case, seen, effort)

    look = settings(
        max_examples=max(1, round(law.examples * effort.times)),
        deadline=None,
        database=None,
        phases=_PHASES,
        suppress_health_check=_EVERY,
        report_multiple_bugs=False,
        print_blob=False,
    )
    drawn: Callable[[], None] = seed(f"{effort.seed} {law.id}")(look(given(case=law.cases)(once)))
    try:
        with contextlib.suppress(_Enough, LawFailure, Unsatisfiable):
            drawn()
    except Flaky:
        seen.trouble = "what broke once held when it was asked again: the trainer does not answer alike twice"
    return _concluded(law, seen)


def judge_again(law: Law, trainer: SubjectClient, case: Recipe) -> LawResult:
    """Hold a trainer to a law in one case."""
    if why := trainer.lacks(*law.needs):
        return LawResult(law.id, law.statement, Outcome.NOT_APPLICABLE, why=why)
    seen = _CaseTally(_plain(trainer))
    with contextlib.suppress(_Enough, LawFailure, UnsatisfiedAssumption):
        _judge_case(law, trainer, case, seen, Effort())
    return _concluded(law, seen)


def _judge_case(law: Law, trainer: SubjectClient, case: Recipe, seen: _CaseTally, effort: Effort) -> None:
    now = time.monotonic()
    shrinking = seen.smallest is not None
    allowed = effort.seconds * (1 if law.tier == 1 else 5)
    over = now - seen.broke > effort.shrink_seconds if shrinking else now - seen.began > allowed
    if over:
        raise _Enough
    assert law.check is not None
    try:
        law.check(trainer, case)
    except LawFailure as broken:
        if seen.smallest is None:
            seen.broke = time.monotonic()
        seen.smallest = (case, broken)
        seen.cases += 1
        raise
    except (RefusesError, UnsupportedError) as unable:
        seen.unable[seen.plain(str(unable))[:200]] += 1
        seen.refused += isinstance(unable, RefusesError)
        if not seen.cases and seen.unable.total() >= _MOST_UNABLE:
            raise _Enough from None
        reject_case()
    except SubjectError as trouble:
        if seen.smallest is None:
            seen.trouble = seen.plain(str(trouble))
        raise _Enough from None
    else:
        seen.cases += 1


def _concluded(law: Law, seen: _CaseTally) -> LawResult:
    evidence: dict[str, Any] = {"cases": seen.cases, "unable": dict(seen.unable.most_common(5))}
    outcome = Outcome.PASSED
    if seen.smallest is not None:
        case, broken = seen.smallest
        outcome = Outcome.FAILED
        evidence |= {"expected": seen.plain(broken.expected), "got": seen.plain(broken.got)}
        evidence["case"] = case.model_dump(mode="json")
        evidence["why"] = seen.trouble
    elif seen.trouble:
        outcome, evidence["why"] = Outcome.ERROR, seen.trouble
    elif not seen.cases:
        # What says that it can and then refuses every case has not been judged, and is not what it says.
        outcome = Outcome.ERROR if seen.refused else Outcome.NOT_APPLICABLE
        evidence["why"] = "; ".join(seen.unable) or "no case came up"
    return LawResult(law.id, law.statement, outcome, seconds=round(time.monotonic() - seen.began, 3), **evidence)


def _plain(trainer: SubjectClient) -> Callable[[str], str]:
    """Makes words such that they do not depend on where the suite, or what goes with it, lies, nor on new names."""
    places = (str(trainer.scratch), *sorted({*sys.path, sys.prefix}, key=len, reverse=True))
    ours = "|".join(re.escape(place) for place in places if len(place) > 1)
    name = re.compile(rf"(?:{ours})/(?:tmp[a-z0-9_]{{8}}(?:/|\b))*")
    return lambda words: name.sub(_SOMEWHERE, words)
