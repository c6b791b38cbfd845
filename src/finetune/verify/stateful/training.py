"""One run of one task, whatever happens to it: the model is the run that nobody disturbed.

However often it dies, is moved or spoiled, the end has the same bytes, and at every moment what lies on disk is a whole
part of it.
"""

import shutil
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import EvidenceError
from finetune.verify.check import check, check_same
from finetune.verify.stateful.deaths import CODES, Death
from finetune.verify.stateful.lives import Ending, LifeClient, RunSnapshot, Task

REFUSED = 3


@dataclass(frozen=True)
class UndisturbedRun:
    """A run that nobody disturbed: what it left, how often it changed its folder, and how it measures."""

    look: RunSnapshot
    changes: int
    measured: Callable[[], str]


class TrainingLife:
    """A run of a task in a folder of its own; stages act on it, and `check` is what holds at every moment."""

    def __init__(self, subject: LifeClient, task: Task, whole: UndisturbedRun, root: Path) -> None:
        self.subject = subject
        self.task = task
        self.whole = whole
        self.root = root
        self.folder = root / "run"
        self.newest = 0
        self.lives = 0
        self.same_plan = True
        self.died: Counter[str] = Counter()

    @property
    def look(self) -> RunSnapshot:
        """What lies there now."""
        return self.subject.look(self.folder)

    @property
    def resumable(self) -> bool:
        """Whether there is a checkpoint to go on from, and anything left to do."""
        look = self.look
        return bool(look.checkpoints) and not look.finished

    @property
    def begun(self) -> bool:
        """Whether there is a folder."""
        return self.folder.exists()

    @property
    def finished(self) -> bool:
        """Whether the run says that it is whole."""
        return self.look.finished

    @property
    def unfinished(self) -> bool:
        """Whether anything is left to do."""
        return not self.look.finished

    def go_on(self, death: Death | None) -> None:
        """One process more; it ends as it was meant to, or finishes the run before."""
        self.lives += 1
        if self.look.begun:
            ending = in_time(self.subject.resume(self.folder, death))
        else:
            ending = in_time(self.subject.train(self.task, self.folder, death))
        after = self.look
        if death is not None and ending.code == CODES[death.by]:
            self.died[death.by] += 1
        check("Traceback" not in ending.stderr, expected="words", got=ending.stderr, law="run.says_so")
        if after.finished:
            codes = {0, 1, *([CODES[death.by]] if death else [])}
            check(ending.code in codes, expected=f"one of {codes}", got=last_words(ending), law="run.code")
        else:
            self._check_death(death, ending, after)
        newest = max(after.checkpoints, default=0)
        check(newest >= self.newest, expected=f"step {self.newest}", got=f"step {newest}", law="checkpoints.outlive")
        if after.finished:
            check_same((self.newest,) if self.newest else (), after.resumed[-1:], law="resume.newest")
        self.newest = newest

    def _check_death(self, death: Death | None, ending: Ending, after: RunSnapshot) -> None:
        check(death is not None, expected="a finished run", got=last_words(ending), law="run.ends")
        assert death is not None
        check(ending.code == CODES[death.by], expected=CODES[death.by], got=last_words(ending), law="run.code")
        if death.by == "full":
            check("cannot write" in ending.stderr, expected="cannot write", got=ending.stderr, law="run.full_disk")
        if death.by == "interrupt":
            intact = f"the checkpoint of step {max(after.checkpoints, default=0)} is intact"
            words = intact if after.checkpoints else "had been written yet"
            check(words in ending.stderr, expected=words, got=ending.stderr, law="run.last_words")
            hint = "go on with: ft train --resume"
            hinted = hint in ending.stderr
            check(
                hinted == after.begun,
                expected=hint if after.begun else "no hint",
                got=ending.stderr,
                law="run.last_words",
            )

    def refuses(self, law: str, named: str) -> None:
        """The run cannot be gone on with: something is named, and all stays as it is."""
        before = content(self.folder)
        ending = in_time(self.subject.resume(self.folder))
        refused = ending.code == REFUSED and named in ending.stderr
        check(refused, expected=f"code {REFUSED}, naming {named}", got=last_words(ending), law=law)
        self.unchanged(before, ending)

    def unchanged(self, before: Mapping[str, bytes], refusal: Ending) -> None:
        """A refusal has a hint, and has changed nothing."""
        check("hint: " in refusal.stderr, expected="a hint", got=refusal.stderr, law="refuse.touches_nothing")
        after = content(self.folder)
        touched = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        check_same([], touched, law="refuse.touches_nothing")

    def measured(self) -> str:
        """What the run measures now."""
        return measured(self.subject, self.folder)

    def check(self) -> None:
        """What is listed is whole, what is told is how it was without trouble, and what is finished is the same."""
        look, model = self.look, self.whole.look
        check_same(dict.fromkeys(look.checkpoints, ""), look.checkpoints, law="checkpoints.whole")
        check_same(_steps(model.course[: len(look.course)]), _steps(look.course), law="course.same")
        logged = [event["step"] for event in look.course if event["event"] == "StepDone"]
        newest, last = max(look.checkpoints, default=0), max(logged, default=0)
        check(newest <= last, expected=f"at most step {last}", got=f"step {newest}", law="checkpoints.logged")
        check_same((), look.damaged, law="result.whole")
        if look.finished:
            self._check_end(look, model)

    def _check_end(self, look: RunSnapshot, model: RunSnapshot) -> None:
        check_same(len(model.course), len(look.course), law="end.course")
        # With another rhythm other checkpoints are left, and the plan says so.
        mutable = () if self.same_plan else ("checkpoints/", "plan")
        check_same(_without(model.files, mutable), _without(look.files, mutable), law="end.files")
        names = [[*_without(dict.fromkeys(each.names), mutable)] for each in (model, look)]
        check_same(*names, law="end.names")
        mutable = () if self.same_plan else ("plan", "notes")
        check_same(_without(model.record, mutable), _without(look.record, mutable), law="end.record")

    def close(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self.root)


def undisturbed(subject: LifeClient, task: Task, folder: Path) -> UndisturbedRun:
    """The task, done without any trouble.

    Raises:
        LawFailure: not even then does it come to its end.
        EvidenceError: the subject refuses the task, so that there is no story to tell.
    """
    ending = in_time(subject.train(task, folder))
    look = subject.look(folder)
    if ending.code == REFUSED and not look.begun:
        raise EvidenceError(f"{subject.name} refuses the task of this story: {ending.stderr.strip()[-400:]}")
    done = ending.code in (0, 1) and look.finished and ending.changes is not None
    check(done, expected="a finished run", got=last_words(ending), law="run.ends")
    return UndisturbedRun(look, ending.changes or 0, lambda: measured(subject, folder))


def measured(subject: LifeClient, folder: Path) -> str:
    """What a finished run measures."""
    ending = in_time(subject.evaluate(folder))
    check_same((0, ""), (ending.code, "" if ending.code == 0 else ending.stderr), law="measure.same")
    return ending.answer


def in_time(ending: Ending) -> Ending:
    """How a process ended, unless it had to be ended.

    Raises:
        EvidenceError: it took longer than anybody waits, of which a slow machine may be guilty.
    """
    if ending.code == -signal.SIGALRM:
        raise EvidenceError("a process took longer than it is given, and was ended")
    return ending


def last_words(ending: Ending) -> str:
    """How a process ended, and its last words."""
    return f"code {ending.code}: {ending.stderr.strip()[-500:]}"


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; whose turn it is in there is nobody's content."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def spoil(file: Path, place: int, how: str) -> None:
    """Change one bit of a file, or cut its end off, more than a line's; an empty one grows."""
    old = file.read_bytes()
    at = place % max(1, len(old))
    flipped = old[:at] + bytes([old[at] ^ 1]) + old[at + 1 :] if old else b"x"
    file.write_bytes(flipped if how == "flip" or not old else old[: max(0, at - 1)])


def _steps(course: tuple[Mapping[str, object], ...]) -> dict[int, Mapping[str, Any]]:
    return dict(enumerate(course))


def _without(values: Mapping[str, object], starts: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not name.startswith(starts)}
