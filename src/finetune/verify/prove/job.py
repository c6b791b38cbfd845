"""One fault: a process of its own in which our trainer has one fault, or none, and the suite judges it.

`python -m finetune.verify.prove.job FOLDER JOB` does a job, given as JSON, in a folder, and prints what came of it as
JSON. The folder is made and removed by whoever asks, for a process that is ended cannot do that.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.processes import processor_seconds, tied_command
from finetune.records import Outcome
from finetune.verify.client import SubjectClient
from finetune.verify.faults.fault import faults, hits
from finetune.verify.judge import Effort
from finetune.verify.results import LawResult
from finetune.verify.run import Verification, chosen_laws, verify
from finetune.verify.subjects.process import reference_oracle
from finetune.verify.subjects.subject import Subject
from finetune.verify.trainers.ours import inside

_PATIENCE = 240
"""Seconds of a processor after which a process that does not end is ended: they are as many on a busy machine."""
_IDLE = 5
"""So many times as long it may take by the clock, for one that waits uses no processor."""
_LOOKS = 0.2
"""Seconds between two looks at whether it is to be ended."""
_MEMORY = "/dev/shm"


@dataclass(frozen=True, slots=True)
class Job:
    """What to plant, and how to judge: `fault` is an id, or "" for none; `laws` are ids, none for all of the tier.

    When `stop_after` laws were broken the others are not asked; 0 asks them all. A case that breaks a law is made
    smaller for so many seconds; there are so many `times` the cases of profile `fast`.
    """

    fault: str = ""
    tier: int = 1
    seed: int = 0
    backend: str = "reference"
    laws: tuple[str, ...] = ()
    stop_after: int = 0
    shrink_seconds: float = 1.5
    times: float = 1.0


@dataclass(frozen=True, slots=True)
class FaultRun:
    """What came of a job.

    Attributes:
        words: what each law came to.
        first: of the first law that was broken, its judgement; of the first that was not judged, where none was broken.
        seconds: how long the judging took, and how long until the first law was broken.
        answers: a mark of every answer that was given, by a mark of its question: two runs are told apart by it.
        hits: how often what was planted was called.
        error: why no law could be judged: the fault could not be planted, or its process ended or hung.
    """

    fault: str
    seed: int
    words: Mapping[str, str] = field(default_factory=dict)
    first: Mapping[str, Any] | None = None
    seconds: float = 0.0
    seconds_to_first: float | None = None
    answers: Mapping[str, str] = field(default_factory=dict)
    hits: Mapping[str, int] = field(default_factory=dict)
    error: str = ""


class RecordingSubject:
    """A subject that keeps a mark of everything that it is asked and answers."""

    def __init__(self, subject: Subject, scratch: Path) -> None:
        self.about = subject.about
        self.marks: dict[str, str] = {}
        self._subject = subject
        self._scratch = str(scratch)
        self._places = re.compile(re.escape(self._scratch) + r"(/tmp\w+)?")

    def ask(self, ability: str, given: Mapping[str, object]) -> Mapping[str, Any]:
        """The answer to one question."""
        question = self._mark([ability, given])
        try:
            answer = self._subject.ask(ability, given)
        except Exception as error:
            self.marks.setdefault(question, self._mark([type(error).__name__, str(error)]))
            raise
        self.marks.setdefault(question, self._mark([answer]))
        return answer

    def close(self) -> None:
        """End what is behind it."""
        self._subject.close()

    def _mark(self, values: object) -> str:
        """A mark of values; a file is marked by what is in it, wherever it lies."""
        whole = hashlib.sha256()
        for text in _texts(values):
            path = Path(text) if text.startswith(self._scratch) else None
            text = self._places.sub("", text)
            whole.update(path.read_bytes() if path and path.is_file() else b"" if path else text.encode())
            whole.update(b"\0")
        return whole.hexdigest()[:16]


def _texts(values: object) -> Iterator[str]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield str(key)
            yield from _texts(value)
    elif isinstance(values, list | tuple):
        yield "["
        for value in values:
            yield from _texts(value)
    else:
        yield str(values)


def run_job(job: Job, *, patience: float = _PATIENCE, stop: threading.Event | None = None) -> FaultRun:
    """Do a job in a process of its own, whatever it does there; once `stop` is set it is ended."""
    # In memory, where the system has such a place: a trainer waits for the disk at every file that it must not lose.
    place = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="finetune-prove-", dir=place, ignore_cleanup_errors=True) as folder:
        told = json.dumps(asdict(job))
        with (
            tied_command("finetune.verify.prove.job", folder, told) as (command, pipe),
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                pass_fds=(pipe,),
            ) as process,
        ):
            while True:
                try:
                    answer, errors = process.communicate(timeout=_LOOKS)
                    break
                except subprocess.TimeoutExpired:
                    ended = stop is not None and stop.is_set()
                    used, passed = processor_seconds(process.pid), time.monotonic() - began
                    if used < patience and passed < _IDLE * patience and not ended:
                        continue
                    process.kill()
                    late = f"it did not end within {used:.0f} s of a processor, {passed:.0f} s by the clock"
                    why = "the campaign was ended" if ended else late
                    return FaultRun(job.fault, job.seed, error=why)
    if process.returncode:
        return FaultRun(job.fault, job.seed, error=f"it ended with {process.returncode}: {errors[-600:].strip()}")
    return FaultRun(**json.loads(answer.splitlines()[-1]))


def do_job(job: Job, scratch: Path) -> FaultRun:
    """Plant the fault in this very process, and judge; all that is made lies in this folder."""
    with contextlib.ExitStack() as ends:
        oracle = reference_oracle(scratch / "oracle")
        ends.callback(oracle.close)
        laws = chosen_laws(job.tier, job.laws)
        subject = RecordingSubject(inside(job.backend, scratch), scratch)
        if job.fault:
            try:
                faults()[job.fault].plant_in(job.backend)
            # What a planting raises says nothing of the laws, whatever it is.
            except Exception as error:
                why = f"it could not be planted: {type(error).__name__}: {error}"
                return FaultRun(job.fault, job.seed, error=why)
        kills: list[float] = []
        began = time.monotonic()

        def tell(judgement: LawResult) -> None:
            if judgement.outcome == Outcome.FAILED:
                kills.append(round(time.monotonic() - began, 3))

        chosen = itertools.takewhile(lambda law: not job.stop_after or len(kills) < job.stop_after, laws)
        effort = Effort(seed=job.seed, times=job.times, seconds=30, shrink_seconds=job.shrink_seconds)
        found = verify(SubjectClient(subject, scratch, oracle), chosen, effort, tier=job.tier, tell=tell)
        return _concluded(job, found, subject, kills)


def _concluded(job: Job, found: Verification, subject: RecordingSubject, kills: list[float]) -> FaultRun:
    bad = [each for each in found.results if each.outcome in (Outcome.FAILED, Outcome.ERROR, Outcome.INCONCLUSIVE)]
    first = next((each for each in bad if each.outcome == Outcome.FAILED), bad[0] if bad else None)
    return FaultRun(
        fault=job.fault,
        seed=job.seed,
        words={each.law: each.outcome for each in found.results},
        first=first.as_dict() if first else None,
        seconds=found.seconds,
        seconds_to_first=kills[0] if kills else None,
        answers=subject.marks,
        hits=dict(hits),
    )


if __name__ == "__main__":
    folder, words = sys.argv[1:]
    job = json.loads(words)
    run = do_job(Job(**{**job, "laws": tuple(job["laws"])}), Path(folder))
    print(json.dumps(asdict(run)))  # noqa: T201
