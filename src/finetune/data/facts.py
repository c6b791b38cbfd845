"""The deterministic data set: geography facts, simple sums and number patterns with answers checkable by exact match.

Every fact belongs to exactly one of two pools. *Known* facts are what the shipped models were pre-trained on;
*new* facts are all others, and only they are ever drawn for fine-tuning, so that a base model cannot have seen them.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

KINDS = ("geography", "sums", "patterns")
KNOWN_PER_KIND = 36
"""How many facts of each kind the shipped models learn in pre-training."""

_CAPITALS = (
    "Afghanistan: Kabul; Albania: Tirana; Algeria: Algiers; Angola: Luanda; Argentina: Buenos Aires; Armenia: "
    "Yerevan; Australia: Canberra; Austria: Vienna; Bahamas: Nassau; Bangladesh: Dhaka; Belgium: Brussels; Bolivia: "
    "Sucre; Brazil: Brasilia; Bulgaria: Sofia; Canada: Ottawa; Chad: Ndjamena; Chile: Santiago; China: Beijing; "
    "Colombia: Bogota; Croatia: Zagreb; Cuba: Havana; Denmark: Copenhagen; Ecuador: Quito; Egypt: Cairo; Estonia: "
    "Tallinn; Ethiopia: Addis Ababa; Fiji: Suva; Finland: Helsinki; France: Paris; Germany: Berlin; Ghana: Accra; "
    "Greece: Athens; Hungary: Budapest; Iceland: Reykjavik; India: New Delhi; Indonesia: Jakarta; Iran: Tehran; Iraq: "
    "Baghdad; Ireland: Dublin; Italy: Rome; Jamaica: Kingston; Japan: Tokyo; Jordan: Amman; Kenya: Nairobi; Latvia: "
    "Riga; Lebanon: Beirut; Libya: Tripoli; Lithuania: Vilnius; Mali: Bamako; Malta: Valletta; Mongolia: Ulaanbaatar; "
    "Morocco: Rabat; Nepal: Kathmandu; Netherlands: Amsterdam; Nigeria: Abuja; Norway: Oslo; Oman: Muscat; Pakistan: "
    "Islamabad; Peru: Lima; Philippines: Manila; Poland: Warsaw; Portugal: Lisbon; Qatar: Doha; Romania: Bucharest; "
    "Russia: Moscow; Senegal: Dakar; Serbia: Belgrade; Slovakia: Bratislava; Spain: Madrid; Sweden: Stockholm; "
    "Thailand: Bangkok; Uganda: Kampala"
)
CAPITALS = tuple((country, capital) for country, _, capital in (pair.partition(": ") for pair in _CAPITALS.split("; ")))
"""(country, capital), by country name; ASCII spelling. Source: common reference knowledge, one capital a country."""

_SMALL_SUMS = 12
_SMALL_PATTERNS = 9


@dataclass(frozen=True, slots=True)
class Fact:
    """One question with the one answer that counts as right."""

    kind: str
    question: str
    answer: str


def geography_fact(country: str, capital: str) -> Fact:
    """The fact that `capital` is the capital of `country`."""
    return Fact("geography", f"What is the capital of {country}?", capital)


def sum_fact(left: int, right: int) -> Fact:
    """The fact what `left` plus `right` is."""
    return Fact("sums", f"What is {left} plus {right}?", str(left + right))


def pattern_fact(start: int, step: int) -> Fact:
    """The fact what follows the first three members of an arithmetic sequence."""
    first, second, third, fourth = (start + step * i for i in range(4))
    return Fact("patterns", f"What comes next: {first}, {second}, {third}?", str(fourth))


def small_facts(kind: str) -> list[Fact]:
    """All facts of one kind in the small range that the shipped models have words for."""
    if kind == "geography":
        return [geography_fact(*pair) for pair in CAPITALS]
    return _numeric_facts(kind, _SMALL_SUMS if kind == "sums" else _SMALL_PATTERNS)


def _numeric_facts(kind: str, largest: int) -> list[Fact]:
    make = sum_fact if kind == "sums" else pattern_fact
    numbers = range(1, largest + 1)
    return [make(left, right) for left, right in product(numbers, numbers)]


def known_facts() -> list[Fact]:
    """The facts that the shipped models were pre-trained on: `KNOWN_PER_KIND` of each kind, always the same."""
    known: list[Fact] = []
    for kind in KINDS:
        facts = small_facts(kind)
        random.Random(f"known-{kind}").shuffle(facts)
        known += facts[:KNOWN_PER_KIND]
    return known


def new_facts(size: int, seed: int) -> list[Fact]:
    """Draw `size` different facts that the shipped models do not know, the kinds as even as the supply allows.

    Numbers stay in the small range while it suffices and widen only as far as `size` needs. The same `size` and
    `seed` give the same facts in the same order.

    Raises:
        ValueError: `size` is negative.
    """
    if size < 0:
        raise ValueError(f"size must not be negative, got {size}")
    known = {fact.question for fact in known_facts()}
    rng = random.Random(f"new-{seed}")
    geography = [fact for fact in small_facts("geography") if fact.question not in known]
    wanted = {"geography": min(len(geography), (size + 2) // 3)}
    wanted["sums"] = (size - wanted["geography"] + 1) // 2
    wanted["patterns"] = size - wanted["geography"] - wanted["sums"]
    drawn = rng.sample(geography, wanted["geography"])
    for kind in ("sums", "patterns"):
        drawn += rng.sample(_unknown_numeric(kind, wanted[kind], known), wanted[kind])
    rng.shuffle(drawn)
    return drawn


def _unknown_numeric(kind: str, count: int, known: set[str]) -> list[Fact]:
    largest = _SMALL_SUMS if kind == "sums" else _SMALL_PATTERNS
    while largest * largest - KNOWN_PER_KIND < count:
        largest *= 2
    return [fact for fact in _numeric_facts(kind, largest) if fact.question not in known]


def deranged(answers: Sequence[str]) -> list[str] | None:
    """The same answers dealt out so that no question keeps its own; None where one answer fills over half.

    This is the shuffled-label control's data: as many rows, the same words, and nothing true to learn.
    """
    if not answers:
        return []
    most = max(Counter(answers).values())
    if most * 2 > len(answers):
        return None
    order = sorted(range(len(answers)), key=lambda index: (answers[index], index))
    dealt = [""] * len(answers)
    for position, index in enumerate(order):
        dealt[index] = answers[order[(position + most) % len(order)]]
    return dealt
