"""How far rounding alone moves a model's log probabilities, and the bounds that follow from it.

No bound between two ways to compute a model is a number that somebody chose once: each is measured on that model, on
the prompts that are compared. A random model of two layers rounds a hundred times less than a trained one of thirty.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.evidence.drift import STORED, Bound, NextTokens, distance, divergence, log_softmax
from finetune.files import storage_errors
from finetune.ports import Session

Array = NDArray[Any]
FACTOR = 16.0
"""How many times a model's own rounding another way to compute it may be off.

Of SmolLM2 another attention kernel is one floor away, llama.cpp four; a thousandth of one tensor moves it by 160.
"""
ROUNDED_FACTOR = 3.0
"""How many times what rounding its weights does to a model a file with such weights may be off.

llama.cpp rounds what the weights are multiplied with to as many bits: that is 1.4 times as much; the rest is chance.
"""
NARROW_FACTOR = 3.0
"""The same for a model that computes in bfloat16 or float16.

Each result is rounded to few bits there, which outweighs the order of sums: 1.4 times from one way to the other.
"""
MOST_TOKENS = 256
"""On how many tokens of the prompts rounding is measured."""
SHIFT = 0.01
"""By what share a weight is put off to see what a bound can see."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How far two computations of one model are apart that differ by rounding alone.

    Attributes:
        distance: the worst root mean square difference of log probabilities, in spreads of the logits.
        kl: the worst KL divergence at one place, in nats.
        logit: the largest difference of one logit.
        nats: the worst root mean square difference of log probabilities, in nats.
        places: at how many places it was measured.
    """

    distance: float
    kl: float
    logit: float
    nats: float
    places: int

    def bound(self, factor: float = FACTOR, what: str = "this model's own rounding") -> Bound:
        """How far another computation may be off; a divergence grows with the square of a distance."""
        why = f"{factor:g} times {what}, {self.distance:.2g} at {self.places} places"
        return Bound(factor * self.distance, factor**2 * self.kl, why, self.distance)


def factor_of(dtype: str) -> float:
    """How many times its own rounding another way to compute a model of this type may be off."""
    return FACTOR if dtype == "float32" else NARROW_FACTOR


def measure_rounding(session: Session, sequences: Sequence[Sequence[int]]) -> Rounding:
    """How far a session is from float64: the floor below which two ways to compute a model cannot be told apart.

    Raises:
        ValueError: there is no token in the sequences.
    """
    chosen = choose(sequences)
    return _apart(_rows(session, chosen), [row for each in session.logits_in_other_precision(chosen) for row in each])


def measure_between(session: Session, other: Session, sequences: Sequence[Sequence[int]]) -> Rounding:
    """How far two sessions are apart that have the same weights but for rounding."""
    chosen = choose(sequences)
    return _apart(_rows(session, chosen), _rows(other, chosen))


def measure_sight(
    session: Session, names: Sequence[str], sequences: Sequence[Sequence[int]], bound: Bound
) -> dict[str, float]:
    """By what share each of these weights of the base must be off for a bound to be exceeded.

    Each is put off by a hundredth in memory; what it takes follows in proportion, beside what is off anyway.

    Args:
        names: weights by their names in the model's files; one that moves nothing is left out.
    """
    room = float(np.sqrt(max(bound.distance**2 - bound.off**2, 0.0)))
    chosen = choose(sequences, MOST_TOKENS // 8)
    own, found = _rows(session, chosen), {}
    still = FACTOR * _apart(own, own).distance
    for name in names:
        with session.scaled(name, 1 + SHIFT):
            moved = _apart(own, _rows(session, chosen)).distance
        if moved > still:
            found[name] = SHIFT * room / moved
    return found


def choose(sequences: Sequence[Sequence[int]], most: int = MOST_TOKENS) -> list[list[int]]:
    """The longest sequence, cut where it takes half the room, and the shortest ones that fit beside it.

    Raises:
        ValueError: there is no token in them.
    """
    by_length = sorted((list(each) for each in sequences if each), key=len)
    if not by_length:
        raise ValueError("rounding cannot be measured without a token")
    chosen = [by_length.pop()[: most // 2]]
    for each in by_length:
        if sum(map(len, chosen)) + len(each) > most:
            break
        chosen.append(each)
    return chosen


def _rows(session: Session, sequences: Sequence[Sequence[int]]) -> list[Array]:
    """The logits after each token of each sequence."""
    from safetensors.numpy import load_file

    with TemporaryDirectory(prefix="finetune-") as folder:
        path = Path(folder) / "logits.safetensors"
        with storage_errors(path):
            session.save_logits(sequences, path)
        stored = load_file(path)
    return [row for index in range(len(sequences)) for row in stored[str(index)]]


def _apart(own: Sequence[Array], other: Sequence[Array]) -> Rounding:
    pairs = [(row, NextTokens(np.arange(len(row)), log_softmax(each))) for row, each in zip(own, other, strict=True)]
    # A number that was stored in float32 is off by so much at least, though both should happen to agree.
    logs = max(float(-told.logs.min()) for _, told in pairs)
    least = max(STORED * float(np.abs(row).max()) / float(row.std()) for row in own)
    apart = [max(least, distance(row, told)) for row, told in pairs]
    return Rounding(
        distance=max(apart),
        kl=max(STORED * logs / FACTOR, *(divergence(row, told) for row, told in pairs)),
        logit=max(
            max(float(np.abs(row - each).max()), STORED * float(np.abs(row).max()))
            for row, each in zip(own, other, strict=True)
        ),
        nats=max(each * float(row.std()) for each, row in zip(apart, own, strict=True)),
        places=len(own),
    )
