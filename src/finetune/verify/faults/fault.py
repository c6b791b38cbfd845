"""A fault, and how it is planted: in the place of a public function, for as long as the process lives."""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module

_ROOMS = (
    *("config", "data", "template", "mask", "batch", "model", "loss", "resume", "adapter", "merge", "export", "serve"),
    *("evaluate", "memory", "safety"),
)
"""Where faults stand, stage by stage: `verify/faults/<room>_faults.py`."""
BACKENDS = ("reference", "torch", "mlx")
_BACKEND: ContextVar[str] = ContextVar("the backend that a fault is planted in", default="reference")


class PlantingError(Exception):
    """A fault cannot be planted: what it is to replace is private, or is not there."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that somebody's trainer did wrong, planted in ours.

    Attributes:
        id: its number in the list of real faults, such as A064; several plantings of one have a letter more.
        slug: its name there, such as mask.end_inclusive; the part before the dot is its stage.
        real: where it happened, such as "mlx-lm #1697"; "" where it is a known kind without a public case.
        what: what goes wrong, in a sentence: the planting's docstring.
        apply: plants it in this process.
        tier: of the laws that can see it: 2 where only what needs a library of that tier is changed.
        backends: where it can be planted; some sit in the inside of one backend.
    """

    id: str
    slug: str
    real: str
    what: str
    apply: Callable[[], None]
    tier: int = 1
    backends: Sequence[str] = BACKENDS

    def plant_in(self, backend: str) -> None:
        """Plant it in this process, in what belongs to a backend.

        Raises:
            PlantingError: what it is to replace is private, or is not there.
        """
        if backend not in self.backends:
            raise PlantingError(f"{self.id} cannot be planted in {backend}: only in {', '.join(self.backends)}")
        token = _BACKEND.set(backend)
        try:
            self.apply()
        finally:
            _BACKEND.reset(token)

    @property
    def stage(self) -> str:
        """The part of a fine-tune in which it sits."""
        return self.slug.partition(".")[0]


_KNOWN: dict[str, Fault] = {}
hits: Counter[str] = Counter()
"""How often what was planted in this process was called, by the name of what it replaced."""


def fault(
    id: str, slug: str, real: str = "", *, tier: int = 1, backends: Sequence[str] = BACKENDS
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Make a planting a fault that `ft prove` knows; its docstring says what goes wrong."""

    def known(apply: Callable[[], None]) -> Callable[[], None]:
        assert id not in _KNOWN, id
        _KNOWN[id] = Fault(id, slug, real, apply.__doc__ or "", apply, tier, backends)
        return apply

    return known


def planted_by(planter: Callable[..., None], *where: object) -> Callable[[Callable[..., object]], Callable[[], None]]:
    """Make what is wrong a planting: `planter` is given where, and what is wrong."""

    def planting(wrong: Callable[..., object]) -> Callable[[], None]:
        @functools.wraps(wrong)
        def apply() -> None:
            planter(*where, wrong)

        return apply

    return planting


def in_place_of(name: str, *owners: object) -> Callable[[Callable[..., object]], Callable[[], None]]:
    """Make what is wrong a planting: it takes the place of a name of these modules or classes."""

    def plant_in_all(wrong: Callable[..., object]) -> None:
        for owner in owners:
            plant(owner, name, wrong)

    return planted_by(plant_in_all)


def plant(owner: object, name: str, wrong: Callable[..., object]) -> None:
    """Put a fault in the place of what is right; the fault is given what is right, and then what that was given.

    `owner` is a module or a class. Where other modules have taken the name with `from ... import`, it is planted there.

    Raises:
        PlantingError: the name is private, which anybody may change without a word, is not there, or takes what the
            fault does not.
    """
    place = f"{getattr(owner, '__name__', owner)}.{name}"
    if name.startswith("_") and not name.endswith("__"):
        raise PlantingError(f"{place} is private: plant the fault in a public function")
    if not hasattr(owner, name):
        raise PlantingError(f"{place} is gone: plant the fault where its work is done now")
    right = getattr(owner, name)
    _refuse_other_arguments(place, right, wrong)

    @functools.wraps(right)
    def planted(*given: object, **named: object) -> object:
        hits[place] += 1
        return wrong(right, *given, **named)

    setattr(owner, name, planted)


def _refuse_other_arguments(place: str, right: Callable[..., object], wrong: Callable[..., object]) -> None:
    """All that is taken can be given to the fault, in order or, as classes of many fields are made, by name."""
    taken = inspect.signature(right).parameters
    named = {name: None for name, each in taken.items() if each.kind is each.KEYWORD_ONLY}
    either = [name for name, each in taken.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    first = [name for name, each in taken.items() if each.kind is each.POSITIONAL_ONLY]
    why = ""
    for in_order, by_name in ((either, ()), ((), either)):
        try:
            inspect.signature(wrong).bind(right, *first, *in_order, **named, **dict.fromkeys(by_name))
        except TypeError as error:
            why = why or str(error)
        else:
            return
    raise PlantingError(f"{place} takes what its fault does not ({why}): plant the fault as it is now")


def backend_under_judgement() -> str:
    """The backend that faults are planted in now."""
    return _BACKEND.get()


def faults() -> Mapping[str, Fault]:
    """Every fault by its id, in the order of the list."""
    for room in _ROOMS:
        import_module(f"finetune.verify.faults.{room}_faults")
    return dict(sorted(_KNOWN.items()))
