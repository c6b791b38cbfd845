"""The oracle: our own trainer in float64, in a process of its own, which no planted fault reaches."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.processes import python_command
from finetune.verify.subjects.process import SubprocessSubject
from finetune.verify.subjects.subject import About


class LazySubject:
    """A subject to a program that is started when it is first asked.

    Args:
        command: the program, as for `SubprocessSubject`.
        folder: where it lives; it is made.
    """

    def __init__(self, about: About, command: Sequence[str], folder: Path) -> None:
        self.about = about
        self._command = command
        self._folder = folder
        self._subject: SubprocessSubject | None = None

    @property
    def _opened(self) -> SubprocessSubject:
        if self._subject is None:
            self._folder.mkdir(parents=True)
            self._subject = SubprocessSubject(self._command, self._folder)
        return self._subject

    def ask(self, ability: str, given: Mapping[str, object]) -> Mapping[str, Any]:
        """The answer to one question."""
        return self._opened.ask(ability, given)

    def close(self) -> None:
        """End it, if it was ever started."""
        if self._subject is not None:
            self._subject.close()


def reference_oracle(folder: Path) -> LazySubject:
    """Our trainer in float64 without any fault, for what has to come out."""
    command = python_command("-m", "finetune.verify.trainers.ours", "reference")
    return LazySubject(About("finetune with reference", {}, {}), command, folder)
