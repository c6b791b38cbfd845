"""Laws that chance has a hand in: judged by a sequential test, with the rates at which it errs.

Each case is a success or a failure. A sound trainer succeeds with probability `sound` at least, and one that breaks the
law with `broken` at most. The evidence against a trainer is the likelihood ratio of the two, which for a sound one
exceeds 1 / a with probability a at most, however often one looks (Ville's inequality); the evidence for it likewise.

Source: A. Wald, 1945, "Sequential tests of statistical hypotheses"; J. Ville, 1939; S. Holm, 1979, "A simple
sequentially rejective multiple test procedure".
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

FALSE_ALARMS = 0.001
"""The probability, at most, with which a whole suite calls any law broken by chance that a sound trainer keeps."""
MISSES = 0.01
"""The probability, at most, with which a law is said to hold of a trainer that breaks it as often as `broken` says."""


@dataclass(frozen=True, slots=True)
class Chance:
    """How a law that chance has a hand in is judged.

    Attributes:
        draw: a case, independent of all others, from random numbers.
        sound: how often a sound trainer keeps it, at least.
        broken: how often one that breaks it keeps it all the same, at most.
        most: how many cases are drawn before it stays undecided.
    """

    draw: Callable[[Random], Any]
    sound: float
    broken: float
    most: int

    def __post_init__(self) -> None:
        if not 0 < self.broken < self.sound < 1 or self.most < self.fewest:
            raise ValueError(f"nothing can be decided so: {self.broken}, {self.sound}, {self.most} cases")

    @property
    def fewest(self) -> int:
        """How many cases it takes, all of them kept, to say that it holds."""
        return math.ceil(math.log(1 / MISSES) / math.log(self.sound / self.broken))


@dataclass(slots=True)
class LikelihoodEvidence:
    """What the cases so far say, as logarithms of likelihood ratios, now and at most."""

    chance: Chance
    cases: int = 0
    against: float = 0.0
    most_against: float = 0.0
    least_against: float = 0.0

    def add(self, *, kept: bool) -> None:
        """One case more."""
        sound, broken = self.chance.sound, self.chance.broken
        self.cases += 1
        self.against += math.log(broken / sound) if kept else math.log((1 - broken) / (1 - sound))
        self.most_against = max(self.most_against, self.against)
        self.least_against = min(self.least_against, self.against)

    @property
    def false_alarm(self) -> float:
        """The probability, at most, with which a sound trainer ever looks as bad as this one."""
        return math.exp(-self.most_against)

    @property
    def holds(self) -> bool:
        """Whether it was at any time so good that a trainer that breaks the law is so with probability MISSES."""
        return -self.least_against >= math.log(1 / MISSES)

    def decided(self, laws: int) -> bool:
        """Whether more cases are not needed, where so many laws share the false alarms."""
        return self.holds or self.false_alarm <= FALSE_ALARMS / laws


def broken_by_holm(false_alarms: Mapping[str, float], rate: float = FALSE_ALARMS) -> frozenset[str]:
    """The laws that are broken, where the whole suite may err with this probability.

    Args:
        false_alarms: for each law that chance has a hand in, how probable it is that a sound trainer looks so bad.
    """
    ordered = sorted(false_alarms, key=lambda law: (false_alarms[law], law))
    kept = (place for place, law in enumerate(ordered) if false_alarms[law] > rate / (len(ordered) - place))
    return frozenset(ordered[: next(kept, len(ordered))])
