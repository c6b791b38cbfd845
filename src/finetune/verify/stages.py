"""The stages that a story is made of: each a frozen value with a name, and the act that it stands for.

A new act is a new class here or anywhere: it names itself in `do` and its scene in `scene`, and is known from then on.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field

from finetune.verify.deaths import Death
from finetune.verify.recipes import Recipe
from finetune.verify.subjects import Order

_LATEST = 100_000
Place = Annotated[int, Field(ge=-_LATEST, le=_LATEST)]
"""Where in a file something changes, from its beginning or, below zero, its end."""
Which = Annotated[int, Field(ge=0, le=1_000)]
Damage = Literal["flip", "cut"]


def _in_time(death: Death) -> Death:
    if not 0 <= death.after <= _LATEST:
        raise ValueError(f"a death after {death.after} changes; from 0 to {_LATEST:,}")
    return death


def _in_reach(order: Order) -> Order:
    if not 0 <= order.step <= 99_999_999 or not 0 <= (order.best or 0) <= 99_999_999:
        raise ValueError(f"a checkpoint of step {order.step}, best {order.best}; from 0 to 99,999,999")
    if len(order.content) > 2_000:
        raise ValueError(f"a checkpoint of {len(order.content):,} letters; at most 2,000")
    return order


Doom = Annotated[Death, AfterValidator(_in_time)]
Command = Annotated[Order, AfterValidator(_in_reach)]
Commands = Annotated[tuple[Command, ...], Field(min_length=1, max_length=50, strict=False)]


class Stage(Recipe, ABC):
    """One thing that is done to what a subject has made; `do` is its name in a story.

    `needs` is an ability of the subject beyond those that the scene needs.
    """

    scene: ClassVar[str]
    needs: ClassVar[type | None] = None

    do: str

    @classmethod
    def __pydantic_init_subclass__(cls, **given: Any) -> None:
        """Be known by one's name in one's scene."""
        super().__pydantic_init_subclass__(**given)
        names = get_args(cls.model_fields["do"].annotation)
        if names:
            _KNOWN.setdefault(cls.scene, {})[names[0]] = cls

    def fits(self, world: Any) -> bool:
        """Whether there is anything to do it to."""
        return True

    @abstractmethod
    def act(self, world: Any) -> None:
        """Do it, and hold the subject to the laws of it.

        Raises:
            LawBrokenError: a law does not hold.
        """


_TOLD_IN = ("finetune.verify.training_stages", "finetune.verify.checkpoint_stages")
_KNOWN: dict[str, dict[str, type[Stage]]] = {}


def stages_of(scene: str) -> Mapping[str, type[Stage]]:
    """Every stage that a story of this scene may have, by its name."""
    for module in _TOLD_IN:  # they know this module, and name themselves when they are read
        import_module(module)
    return _KNOWN.get(scene, {})
