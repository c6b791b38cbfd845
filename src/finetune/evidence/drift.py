"""How far one way to compute a model is from another: answers, the first token that differs, and KL divergence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Ids = tuple[int, ...]
_LEAST = float(np.log(np.finfo(np.float32).smallest_subnormal))
"""The logarithm of the smallest probability that float32 tells from nothing."""


@dataclass(frozen=True, slots=True)
class NextTokens:
    """The likeliest ids to follow a sequence, or all, and the logarithms of their probabilities."""

    ids: NDArray[np.int64]
    logs: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """What every way is asked: greedy answers to prompts, and what may follow at places of the trainer's own answers.

    Attributes:
        prompts: as ids.
        steps: how long each answer may be.
        stops: the ids at which an answer ends.
        path: the trainer's answer to each prompt; a way that is asked for nothing but answers has none.
        places: numbers of a prompt and of a token of its path; what follows that many tokens of the path is told.
    """

    prompts: tuple[Ids, ...]
    steps: tuple[int, ...]
    stops: Ids
    path: tuple[Ids, ...] = ()
    places: tuple[tuple[int, int], ...] = ()

    def sequence(self, place: tuple[int, int]) -> Ids:
        """The ids that lead to a place."""
        number, token = place
        return (*self.prompts[number], *self.path[number][:token])

    def cut(self, answers: Sequence[Sequence[int]]) -> tuple[Ids, ...]:
        """Answers as all ways are compared: up to the first id that ends one, and no longer than they may be."""
        kept = []
        for ids, most in zip(answers, self.steps, strict=True):
            end = next((place for place, token in enumerate(ids) if token in self.stops), len(ids))
            kept.append(tuple(ids[: min(end, most)]))
        return tuple(kept)


@dataclass(frozen=True, slots=True)
class InferenceResponse:
    """What a way has said: ids of each answer and, where it can tell, what follows at each place."""

    ids: tuple[Ids, ...]
    following: tuple[NextTokens, ...] | None


class InferencePath(Protocol):
    """One way to compute what was trained: a framework, a file, a server.

    `bound`: how far log probabilities may be off (root mean square), in spreads of the trainer's logits, and the mean
    KL divergence in nats.
    """

    @property
    def name(self) -> str:
        """What it is called in the table."""

    @property
    def bound(self) -> float:
        """How far it may be off."""

    def ask(self, request: InferenceRequest) -> InferenceResponse:
        """Ask it everything at once.

        Raises:
            FineTuneError: it cannot be asked.
        """


@dataclass(frozen=True, slots=True)
class FirstMismatch:
    """The first token in which an answer differs from the trainer's.

    `own` and `theirs` are None where the answer has ended; `gap` is by how many nats the trainer finds its own token
    likelier, and `spread` how far its logits spread there.
    """

    question: int
    token: int
    own: int | None
    theirs: int | None
    gap: float
    spread: float


@dataclass(frozen=True, slots=True)
class Drift:
    """How far a way is from the trainer.

    Attributes:
        questions: how many were asked.
        partings: where answers first differ, in the order of the questions.
        places: at how many places distributions were compared; 0 where the way does not tell them.
        distance: the worst root mean square by which log probabilities are off, in spreads of the trainer's logits.
        mean_kl: KL divergence of the way from the trainer in nats, over what the way tells and the rest as one.
        worst_kl: the largest at one place.
        told: of how many ids, at most, the way tells the probability.
    """

    questions: int
    partings: tuple[FirstMismatch, ...]
    places: int
    distance: float | None
    mean_kl: float | None
    worst_kl: float | None
    told: int


def measure(request: InferenceRequest, own: Sequence[Array], told: InferenceResponse, row_of: Any) -> Drift:
    """Compare what a way told with the trainer.

    Args:
        own: the trainer's logits at each place.
        row_of: gives the trainer's logits at any place (prompt, token of its path).
    """
    partings = []
    for number, (path, theirs) in enumerate(zip(request.path, told.ids, strict=True)):
        if (token := first_difference(path, theirs)) is not None:
            partings.append(_first_mismatch(request, row_of(number, token), (number, token), (path, theirs)))
    if told.following is None or not own:
        return Drift(len(request.prompts), tuple(partings), 0, None, None, None, 0)
    kls = [divergence(row, following) for row, following in zip(own, told.following, strict=True)]
    return Drift(
        questions=len(request.prompts),
        partings=tuple(partings),
        places=len(kls),
        distance=max(distance(row, following) for row, following in zip(own, told.following, strict=True)),
        mean_kl=float(np.mean(kls)),
        worst_kl=max(kls),
        told=max(len(following.ids) for following in told.following),
    )


def problems(drift: Drift, bound: float) -> list[str]:
    """What a way does that it may not; a token may differ only where two are as good as equal within the bound."""
    found = []
    if drift.distance is not None and not drift.distance <= bound:
        found.append(f"log probabilities are off by {drift.distance:.2g} spreads of the logits (allowed: {bound:g})")
    if drift.mean_kl is not None and not drift.mean_kl <= bound:
        found.append(f"the mean KL divergence is {drift.mean_kl:.2g} nats (allowed: {bound:g})")
    far = [parting for parting in drift.partings if not parting.gap <= 2 * bound * parting.spread]
    if far:
        worst = max(far, key=lambda parting: parting.gap)
        found.append(
            f"question {worst.question}, token {worst.token}: {_shown(worst.theirs)} instead of {_shown(worst.own)}, "
            f"which the trainer finds likelier by {worst.gap:.3g} nats"
        )
    return found


def first_difference(own: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first place where two answers differ; None where they are equal."""
    if tuple(own) == tuple(theirs):
        return None
    pairs = zip(own, theirs, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(own), len(theirs)))


def log_softmax(row: Array) -> Array:
    """Logits as logarithms of probabilities, in float64."""
    shifted = row.astype(np.float64) - row.max()
    logs: Array = shifted - np.log(np.exp(shifted).sum())
    return logs


def distance(row: Array, told: NextTokens) -> float:
    """By how much log probabilities are off (root mean square), in spreads of the logits `row`."""
    off = np.maximum(log_softmax(row)[told.ids], _LEAST) - np.maximum(told.logs, _LEAST)
    return float(np.sqrt((off**2).mean()) / row.std())


def divergence(row: Array, told: NextTokens) -> float:
    """KL divergence in nats from the logits `row` to what was told; what is not told counts as one more id.

    Where not all is told, this is at most the divergence over all ids.
    """
    own, theirs = log_softmax(row)[told.ids], np.maximum(told.logs, _LEAST)
    shares = np.exp(own)
    total = float((shares * (own - theirs)).sum())
    if len(told.ids) < len(row):
        rest, left = (max(0.0, 1 - float(np.exp(logs).sum())) for logs in (own, theirs))
        if rest > 0:
            total += rest * (np.log(rest) - max(np.log(left) if left > 0 else _LEAST, _LEAST))
    return max(0.0, total)


def _first_mismatch(
    request: InferenceRequest, row: Array, place: tuple[int, int], ids: tuple[Ids, Ids]
) -> FirstMismatch:
    """How near a tie the trainer was where answers part; an answer that has ended stands for its likeliest stop."""
    number, token = place
    own, theirs = (one[token] if token < len(one) else None for one in ids)

    def logit(chosen: int | None) -> float:
        return float(
            row[chosen] if chosen is not None else max((row[stop] for stop in request.stops), default=row.min())
        )

    gap = max(0.0, logit(own) - logit(theirs))
    return FirstMismatch(number, token, own, theirs, gap, float(row.std()))


def _shown(token: int | None) -> str:
    return "the end" if token is None else f"token {token}"
