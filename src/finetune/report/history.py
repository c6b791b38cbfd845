"""The history of the tests: one line for each session of a tier, appended whole and never rewritten."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    ValidationError,
)

from finetune.errors import DataError, StorageError

HISTORY = ".finetune/history.jsonl"
"""Where sessions are written when nothing else is asked for."""
WRITTEN_BY = "make test-e2e-workflow, FT_REAL_MODEL_ENABLE=1 make test-e2e-real-model and make test-e2e-mlx write one"
SCORE_NAME = r"^[A-Za-z0-9][ -~]{0,99}$"
ScoreName = Annotated[str, StringConstraints(pattern=SCORE_NAME)]


class HistoryEntry(BaseModel):
    """What one session of a tier measured; what it did not measure is None, and a score that it did not is absent."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    when: AwareDatetime
    """When the session began."""
    tier: Literal[1, 2, 3]
    commit: str | None
    python: str
    platform: str
    profile: str | None
    """The Hypothesis profile, None where none was loaded."""
    seconds: Annotated[FiniteFloat, Field(ge=0)]
    passed: NonNegativeInt
    failed: NonNegativeInt
    skipped: NonNegativeInt
    errors: NonNegativeInt
    cases: NonNegativeInt | None
    """How many cases Hypothesis generated."""
    largest_process_bytes: PositiveInt | None
    """The largest resident set of any one process: pytest, its workers, and the children that they waited for."""
    scores: dict[ScoreName, FiniteFloat] = {}

    @property
    def pass_rate(self) -> float | None:
        """The share of the tests that ran and passed, 0 to 1; None where none ran."""
        ran = self.passed + self.failed + self.errors
        return self.passed / ran if ran else None

    @property
    def place(self) -> str:
        """Machine, Python and profile: only sessions of one place can be compared."""
        return f"{self.platform} Python {self.python} {self.profile or ''}".rstrip()


def append_entry(path: Path, entry: HistoryEntry) -> None:
    """Add one line in a single write, so that several processes may add to one file; it is on the disk afterwards.

    Raises:
        StorageError: the file cannot be written; the lines before are intact.
    """
    line = entry.model_dump_json().encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            # What a killed writer left is a damaged line, and must not damage this one too.
            size = os.fstat(handle).st_size
            line = line if size == 0 or os.pread(handle, 1, size - 1) == b"\n" else b"\n" + line
            written = os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}", hint="choose another FT_HISTORY"
        ) from None
    if written < len(line):
        raise StorageError(f"cannot write {path}: no space left for the whole line", hint="free some space")


def read_history(path: Path) -> tuple[list[HistoryEntry], list[str]]:
    """All entries of a file, oldest first, and a sentence for each line that is none.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"no history can be read from {path}: {error.strerror or error}", hint=WRITTEN_BY) from None
    entries, problems = [], []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entries.append(HistoryEntry.model_validate_json(line))
        except ValidationError as error:
            problems.append(f"{path}:{number}: {_what_is_wrong(error)}")
    return in_order(entries), problems


def in_order(entries: Sequence[HistoryEntry]) -> list[HistoryEntry]:
    """Oldest first; of the same moment, in the order given."""
    return sorted(entries, key=lambda entry: entry.when)


def _what_is_wrong(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    shown = repr(first["input"])
    value = "" if first["type"] == "missing" else f" (it is {shown if len(shown) <= 60 else shown[:57] + '...'})"
    return f"{where}: {first['msg']}{value}" if where else f"no line of a history: {first['msg']}"
