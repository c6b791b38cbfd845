"""What a judge says of one law: a word, and the evidence for it."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from finetune.verify.laws import short

Word = Literal["holds", "broken", "undecided", "not applicable", "error"]


class BrokenError(AssertionError):
    """A case in which a law does not hold: what had to be, and what was."""

    def __init__(self, expected: object, got: object) -> None:
        self.expected = short(expected)
        self.got = short(got)
        super().__init__(f"expected: {self.expected}\n  got: {self.got}")


def check(holds: object, *, expected: object, got: object) -> None:
    """Hold a trainer to something.

    Raises:
        BrokenError: it does not hold.
    """
    if not holds:
        raise BrokenError(expected, got)


@dataclass(frozen=True, slots=True)
class LawResult:
    """What came of one law.

    Attributes:
        law: its id.
        statement: its sentence.
        cases: how many cases were judged.
        unable: how many cases the trainer had nothing for, or refused, by its words.
        why: of what is not judged, the reason.
        expected, got: of what is broken, for the smallest case.
        case: the smallest case in which it is broken, as JSON values.
        false_alarm: of what chance has a hand in, how probable it is, at most, that a sound trainer looks so bad.
        seconds: how long it took.
    """

    law: str
    statement: str
    word: Word
    cases: int = 0
    unable: dict[str, int] = field(default_factory=dict)
    why: str = ""
    expected: str = ""
    got: str = ""
    case: dict[str, Any] | None = None
    false_alarm: float | None = None
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)
