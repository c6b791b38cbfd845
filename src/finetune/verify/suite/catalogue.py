"""The laws that any trainer is held to, each with its cases and its check: one `@law` is all there is to a new one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from hypothesis import strategies as st

from finetune.verify.laws import LAWS, Law
from finetune.verify.recipes import Recipe
from finetune.verify.suite.chance import Chance
from finetune.verify.suite.trainer import Trainer

Tier = Literal[1, 2]
Check = Callable[[Trainer, Any], None]
_MODULES = (
    "finetune.verify.suite.config_laws",
    "finetune.verify.suite.data_laws",
    "finetune.verify.suite.mask_laws",
    "finetune.verify.suite.packing_laws",
    "finetune.verify.suite.template_laws",
    "finetune.verify.suite.batch_laws",
    "finetune.verify.suite.chance_laws",
    "finetune.verify.suite.loss_laws",
    "finetune.verify.suite.schedule_laws",
    "finetune.verify.suite.resume_laws",
    "finetune.verify.suite.adapter_laws",
    "finetune.verify.suite.merge_laws",
    "finetune.verify.suite.export_laws",
    "finetune.verify.suite.serve_laws",
    "finetune.verify.suite.evaluate_laws",
    "finetune.verify.suite.memory_laws",
    "finetune.verify.suite.safety_laws",
    "finetune.verify.suite.mask_padding_laws",
    "finetune.verify.suite.model_file_laws",
    "finetune.verify.suite.second_run_laws",
)
"""Where laws stand; each names itself when its module is read."""


@dataclass(frozen=True, slots=True)
class CaseLaw:
    """A law that is checked on cases.

    Attributes:
        law: its id, its sentence, and the ability that it is about.
        tier: 1 where a case takes milliseconds, 2 where something is trained for seconds.
        needs: the abilities that its check asks for.
        oracle: what decides, and why that is right.
        cases: the cases; each is a value that can be written down and read again. None where chance draws them.
        kind: the type of the cases.
        cost: about how long one case takes for our own trainer, beside the others: cheap laws are judged first.
        examples: how many cases in profile `fast`.
        chance: where the outcome of a case is left to chance even in a sound trainer, how often, and how it is judged.
    """

    law: Law
    tier: Tier
    needs: tuple[str, ...]
    oracle: str
    cases: st.SearchStrategy[Any] | None
    kind: type[Recipe]
    check: Check
    cost: int = 1
    examples: int = 24
    chance: Chance | None = None

    @property
    def id(self) -> str:
        """Its id."""
        return self.law.id


_CASE_LAWS: dict[str, CaseLaw] = {}


def law(
    id: str, statement: str, *, needs: Sequence[str], oracle: str, cases: st.SearchStrategy[Any] | Chance, **more: Any
) -> Callable[[Check], Check]:
    """Make a check a law: `more` are fields of `CaseLaw` that are not as they mostly are.

    Where chance has a hand in it, cases that break it count against a trainer, and a single one says nothing.
    """

    def known(check: Check) -> Check:
        kind: type[Recipe] = check.__annotations__["case"]
        told = Law(id, statement, ", ".join(needs))
        assert id not in _CASE_LAWS, id
        drawn = {"chance": cases, "cases": None} if isinstance(cases, Chance) else {"cases": cases}
        fields: dict[str, Any] = {"tier": 1, **drawn, **more}
        _CASE_LAWS[id] = CaseLaw(law=told, needs=tuple(needs), oracle=oracle, kind=kind, check=check, **fields)
        return check

    return known


def case_laws(tier: int = 2) -> Mapping[str, CaseLaw]:
    """Every law up to a tier, cheapest first."""
    for module in _MODULES:
        import_module(module)
    found = sorted(_CASE_LAWS.values(), key=lambda law: (law.tier, law.cost, law.id))
    return {law.id: law for law in found if law.tier <= tier}


def all_laws() -> Iterator[Law]:
    """Every law there is: those that are checked on cases, and those of stories."""
    yield from (law.law for law in case_laws().values())
    yield from LAWS.values()
