"""What came of one law: an outcome, and the evidence for it."""

from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.records import Outcome


@dataclass(frozen=True, slots=True)
class LawResult:
    """What came of one law.

    Attributes:
        law: its id.
        statement: its sentence.
        cases: how many cases were judged.
        unable: how many cases the trainer had nothing for, or refused, by its words.
        why: of what is not judged, the reason.
        expected, got: of what failed, for the smallest case.
        case: the smallest case in which it failed, as JSON values.
        seconds: how long it took.
        notes: of a story, what else is to be known of how it was told.
    """

    law: str
    statement: str
    outcome: Outcome
    cases: int = 0
    unable: dict[str, int] = field(default_factory=dict)
    why: str = ""
    expected: str = ""
    got: str = ""
    case: dict[str, Any] | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)
