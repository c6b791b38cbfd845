"""Every error that FineTune raises on purpose, drawn as one tree.

    FineTuneError                  exit 1   something failed; the message says what, where and how to mend it
    ├── UsageError                 exit 2   the command or the configuration is wrong
    │   └── ConfigError            exit 2   one or more configuration problems, all reported at once
    ├── RefusedError               exit 3   a check refused before any work began; nothing was changed
    │   ├── DataError              exit 3   a data file or row cannot be used
    │   ├── TemplateError          exit 3   a prompt template cannot be used with this tokenizer or data
    │   ├── ModelError             exit 3   a model cannot be found, read or adapted
    │   ├── OutputError            exit 3   the output folder cannot be used
    │   └── MissingExtraError      exit 3   an optional dependency is not installed
    ├── TrainingError              exit 1   training itself went wrong
    │   ├── NonFiniteError         exit 1   a loss or gradient became NaN or infinite
    │   ├── OutOfMemoryError       exit 1   memory ran out; what was expected, and what to lower
    │   └── LostProcessError       exit 1   another process of the same run has ended
    ├── StorageError               exit 1   writing to disk failed (no space left, read-only, ...)
    ├── ExportError                exit 1   an exported file is not what was trained; kept as refused
    ├── DeploymentError            exit 1   a server failed, or does not answer as it was trained
    ├── EvidenceError              exit 4   nothing could be judged: the evidence is missing or cannot be had
    └── InterruptedRunError        exit 130 the user pressed Ctrl-C; the last checkpoint is intact

A verdict of "failed" is not an error: it is a finding, carried by `records.Verdict`.
"""

import os
import re
import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path


class FineTuneError(Exception):
    """Something went wrong that FineTune understands; `hint` says how to mend it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a configuration: what, where, and how to mend it."""

    what: str
    where: str
    hint: str = ""

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}"
        return f"{line}\n    hint: {self.hint}" if self.hint else line


class UsageError(FineTuneError):
    """The command line or the configuration is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """One or more configuration problems; `problems` holds them all."""

    def __init__(self, problems: list[Problem]) -> None:
        count = len(problems)
        head = "1 problem in the configuration" if count == 1 else f"{count} problems in the configuration"
        super().__init__("\n".join([f"{head}:", *(f"  {problem}" for problem in problems)]))
        self.problems = problems


class RefusedError(FineTuneError):
    """A check refused before any work began."""

    exit_code = 3


class DataError(RefusedError):
    """A data file or a row in it cannot be used."""


class TemplateError(RefusedError):
    """A prompt template cannot be used with this tokenizer or this data."""


class ModelError(RefusedError):
    """A model cannot be found, read or adapted."""


class OutputError(RefusedError):
    """The output folder cannot be used."""


class MissingExtraError(RefusedError):
    """An optional dependency that this command needs is not installed."""


class TrainingError(FineTuneError):
    """Training itself went wrong."""


class NonFiniteError(TrainingError):
    """A loss or a gradient norm became NaN or infinite; the run stopped there."""


class OutOfMemoryError(TrainingError):
    """Memory ran out: the message says with how much at once, the hint what to lower."""


class LostProcessError(TrainingError):
    """Another process of the same run has ended, so that this one cannot go on; the last checkpoint is intact."""


class StorageError(FineTuneError):
    """Writing to disk failed; what was there before is intact."""


class ExportError(FineTuneError):
    """An exported file does not compute what was trained; it is kept under a name that says so."""


class DeploymentError(FineTuneError):
    """A server failed, or a model that it serves does not answer as it was trained."""


class EvidenceError(FineTuneError):
    """Nothing could be judged: the evidence is missing or cannot be had."""

    exit_code = 4


class InterruptedRunError(FineTuneError):
    """The user stopped the run; the last checkpoint is intact."""

    exit_code = 130


def counted(number: int, noun: str, verbs: str = "") -> str:
    """A count with its noun and its verb, of which both forms are given: `is/are`."""
    one, _, many = verbs.partition("/")
    return f"{number:,} {noun} {one}".rstrip() if number == 1 else f"{number:,} {noun}s {many}".rstrip()


def install_line(what: str) -> str:
    """The line that installs a package, or an extra of ours (`gguf`, or several with commas), into this environment.

    An environment that uv made has no pip of its own: its pyvenv.cfg says who made it.
    """
    requirement = what if "[" in what else f"finetune-suite[{what}]"
    # The link in the environment, never what it leads to: that would be another environment.
    python = Path(sys.executable)
    if python.is_relative_to(os.getcwd()):
        python = python.relative_to(os.getcwd())
    try:
        made_by = (Path(sys.prefix) / "pyvenv.cfg").read_text(encoding="utf-8")
    except (OSError, ValueError):
        made_by = ""
    by_uv = any(line.partition("=")[0].strip() == "uv" for line in made_by.splitlines())
    words = ["uv", "pip", "install", "--python", str(python)] if by_uv else [str(python), "-m", "pip", "install"]
    return f"{shlex.join(words)} '{requirement}'"


_PLACED = re.compile(r"(?s)(.+?)(:\d+|\[\d+\])((?: \S+\[\d+\])?): (.*)")
"""A problem as rows have it: a file, the place in it, perhaps the message of a conversation, and what is wrong."""
_SHOWN = 20
MOST_PROBLEMS = 10_000


class FileProblems(list[str]):
    """The problems of a file that is being read, raised at once where they are so many that nobody reads on."""

    def __init__(self, hint: str) -> None:
        super().__init__()
        self._hint = hint

    def append(self, problem: str) -> None:
        """Add one; DataError where it is one too many."""
        super().append(problem)
        if len(self) >= MOST_PROBLEMS:
            self.raise_all()

    def raise_all(self) -> None:
        """DataError where there is one."""
        raise_all(self, hint=self._hint)


def raise_all(problems: list[str], *, hint: str, what: str = "the data cannot be used") -> None:
    """Raise one DataError that names every problem (twenty in full, the rest counted); nothing when there is none.

    Problems that differ in their place alone are one line with all their places and a count.
    """
    if not problems:
        return
    alike: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for problem in problems[:_SHOWN]:
        placed = _PLACED.fullmatch(problem)
        file, place, within, said = placed.groups() if placed else (problem, "", "", "")
        alike[file, within, f": {said}" if placed else ""].append(place)
    lines = [
        f"{file}{', '.join(places)}{within}{f' ({len(places)} rows)' if len(places) > 1 else ''}{said}"
        for (file, within, said), places in alike.items()
    ]
    more = [f"... and {len(problems) - _SHOWN:,} more"] if len(problems) > _SHOWN else []
    if isinstance(problems, FileProblems) and len(problems) >= MOST_PROBLEMS:
        more[0] += f"; with {len(problems):,} of them the rest was not read"
    raise DataError("\n  ".join([f"{what}:", *lines, *more]), hint=hint)
