"""What came of one law: an outcome, and the evidence for it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from finetune.records import Outcome

Severity = Literal["wrong learning", "data loss", "unsafe", "robustness"]
SEVERITIES: Mapping[Severity, tuple[str, ...]] = {
    "wrong learning": (
        *("data", "rows", "split", "template", "mask", "batches", "padding", "packing", "loss", "gradient", "dropout"),
        *("train", "dpo", "learning", "schedule", "order", "keep", "adapter", "merge", "export", "serve", "evaluate"),
        *("generate", "model", "measure", "course", "cache"),
        *("config.targets", "config.patterns", "config.dropout", "resume.same", "resume.refuses_changed"),
    ),
    "data loss": (
        *("resume", "store", "files", "runs", "checkpoints", "end", "result"),
        *("merge.leaves", "refuse.touches_nothing", "run.full_disk"),
    ),
    "unsafe": ("safety", "template.inert", "protocol.inside"),
    "robustness": (
        *("config", "seed", "memory", "protocol", "run", "refuse", "adapter.placeless"),
        *("cache.found", "packing.shares", "order.same", "order.seeds", "split.same", "store.answers", "store.code"),
    ),
}
"""What the failure of a law costs, worst first, by the law's id or by its subject; an id goes before its subject."""
_SEVERITY_OF: Mapping[str, Severity] = {name: severity for severity, names in SEVERITIES.items() for name in names}


def severity_of(law: str) -> Severity:
    """What the failure of a law costs; of a law that nobody knows, the worst."""
    return _SEVERITY_OF.get(law) or _SEVERITY_OF.get(law.partition(".")[0], "wrong learning")


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
        return {**asdict(self), "severity": severity_of(self.law)}
