"""The catalogue of all laws. One `@law` above a check is all there is to a new one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from hypothesis import strategies as st

from finetune.verify.results import Severity, severity_of
from finetune_strategies.recipes import Recipe

Tier = Literal[1, 2]
SUBJECTS: Mapping[str, tuple[str, ...]] = {
    "config": ("config",),
    "data": ("data", "rows", "split", "order", "cache"),
    "template": ("template",),
    "mask": ("mask",),
    "batches": ("batches", "padding", "packing"),
    "loss": ("loss", "gradient", "dropout"),
    "preference": ("dpo",),
    "train": ("train", "learning", "schedule", "seed", "keep", "runs"),
    "resume": ("resume",),
    "store": ("store", "files"),
    "adapter": ("adapter",),
    "merge": ("merge",),
    "export": ("export",),
    "serve": ("serve",),
    "evaluate": ("evaluate", "generate", "model"),
    "memory": ("memory",),
    "safety": ("safety",),
    "protocol": ("protocol",),
    "life": ("run", "checkpoints", "course", "refuse", "result", "measure", "end"),
}
"""The subjects of ids, by the file in `verify/laws/` that holds their laws."""


@dataclass(frozen=True, slots=True)
class Law:
    """A sentence that holds for every subject with the abilities it needs.

    Attributes:
        id: `subject.what`.
        needs: the abilities that its check asks for.
        oracle: what decides, and why that is right.
        check: holds a subject to it in one case. None for a law that only stories of a life show.
        kind: the type of its cases.
        cases: draws a case; a case can be written down and read again.
        cost: about how long a case takes for our own trainer, beside the others: cheap laws are judged first.
        tier: 1 where a case takes milliseconds, 2 where something is trained for seconds.
        examples: how many cases in profile `fast`.
        scene: the stories that show it, too: of a run's life, or of a store of checkpoints.
    """

    id: str
    statement: str
    needs: tuple[str, ...]
    oracle: str
    check: Callable[[Any, Any], None] | None = None
    kind: type[Recipe] | None = None
    cases: st.SearchStrategy[Any] | None = field(default=None, repr=False)
    cost: int = 1
    tier: Tier = 1
    examples: int = 24
    scene: Literal["", "training", "checkpoints"] = ""

    @property
    def subject(self) -> str:
        """What it is about."""
        return self.id.partition(".")[0]

    @property
    def severity(self) -> Severity:
        """What its failure costs."""
        return severity_of(self.id)


_KNOWN: dict[str, Law] = {}
_ORACLES: dict[Callable[[Any, Any], None], str] = {}
Judging = Callable[[Callable[[Any, Any], None]], Callable[[Any, Any], None]]


def law(id: str, needs: Sequence[str], cases: st.SearchStrategy[Any], **more: Any) -> Judging:
    """Make a check a law, its docstring the law's sentence. `more`: fields of `Law` that override the defaults."""

    def known(check: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        statement, kind = check.__doc__ or id, check.__annotations__["case"]
        add(Law(id, statement, tuple(needs), _ORACLES[check], check, kind, cases, **more))
        return check

    return known


def oracle(words: str) -> Judging:
    """Say of a check, below its `@law`, what decides and why that is right."""

    def judged(check: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        _ORACLES[check] = words
        return check

    return judged


def add(law: Law) -> None:
    """Put a law into the catalogue, where there is none of its id."""
    assert law.id not in _KNOWN, law.id
    _KNOWN[law.id] = law


def catalogue() -> Mapping[str, Law]:
    """Every law by its id, cheapest first."""
    for name in SUBJECTS:
        import_module(f"finetune.verify.laws.{name}")
    return {law.id: law for law in sorted(_KNOWN.values(), key=lambda law: (law.tier, law.cost, law.id))}


def case_laws(tier: int = 2) -> Mapping[str, Law]:
    """The laws up to a tier that are judged on cases that are drawn, cheapest first."""
    return {id: law for id, law in catalogue().items() if law.cases is not None and law.tier <= tier}
