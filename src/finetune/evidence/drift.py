"""How far one inference path is from another: answers, the first token that differs, and KL divergence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Ids = tuple[int, ...]
STORED = 2.0**-24
"""By how much a number is off, relatively, that was rounded to float32 once."""
_LEAST = float(np.log(np.finfo(np.float32).smallest_subnormal))
"""The logarithm of the smallest probability that float32 tells from nothing."""


@dataclass(frozen=True, slots=True)
class NextTokens:
    """The likeliest next ids, or all, with their log probabilities."""

    ids: NDArray[np.int64]
    logs: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """Greedy answers to prompts, and next tokens at places of the trainer's own answers.

    Attributes:
        prompts: as ids.
        steps: how long each answer may be.
        stops: the ids at which an answer ends.
        baseline: the trainer's answer to each prompt; empty where only answers are wanted.
        places: (prompt, token): the next token is wanted after so many tokens of the baseline to that prompt.
    """

    prompts: tuple[Ids, ...]
    steps: tuple[int, ...]
    stops: Ids
    baseline: tuple[Ids, ...] = ()
    places: tuple[tuple[int, int], ...] = ()

    def sequence(self, place: tuple[int, int]) -> Ids:
        """The ids before a place."""
        number, token = place
        return (*self.prompts[number], *self.baseline[number][:token])

    def cut(self, answers: Sequence[Sequence[int]]) -> tuple[Ids, ...]:
        """Cut each answer before its first stop id and at its length limit."""
        kept = []
        for ids, most in zip(answers, self.steps, strict=True):
            end = next((place for place, token in enumerate(ids) if token in self.stops), len(ids))
            kept.append(tuple(ids[: min(end, most)]))
        return tuple(kept)


@dataclass(frozen=True, slots=True)
class InferenceResponse:
    """The ids of each answer and, from paths that report them, the next tokens at each place."""

    ids: tuple[Ids, ...]
    following: tuple[NextTokens, ...] | None


@dataclass(frozen=True, slots=True)
class Bound:
    """How far a path may be from the trainer.

    Attributes:
        distance: root mean square error of log probabilities, in spreads (standard deviations) of the logits.
        kl: the mean KL divergence in nats.
        why: what both were derived from.
        off: the distance that what is right was found to have.
    """

    distance: float
    kl: float
    why: str
    off: float = 0.0


class InferencePath(Protocol):
    """One way to compute the trained model: a framework, a file, a server."""

    @property
    def name(self) -> str:
        """Its name in the table."""

    @property
    def bound(self) -> Bound | None:
        """The largest error allowed; None where weights are not rounded, so that the trainer's own rounding sets it."""

    def ask(self, request: InferenceRequest) -> InferenceResponse:
        """Answer the whole request.

        Raises:
            FineTuneError: it cannot compute here.
        """


@dataclass(frozen=True, slots=True)
class FirstMismatch:
    """The first token in which an answer differs from the trainer's.

    `own` and `theirs` are None where the answer has ended. `gap`: by how many nats the trainer prefers its own token;
    `spread`: the standard deviation of its logits there.
    """

    question: int
    token: int
    own: int | None
    theirs: int | None
    gap: float
    spread: float


@dataclass(frozen=True, slots=True)
class Drift:
    """How far a path is from the trainer.

    Attributes:
        questions: how many were asked.
        mismatches: where answers first differ, in the order of the questions.
        places: how many distributions were compared; 0 where the path reports none.
        distance: the worst root mean square error of log probabilities, in spreads of the trainer's logits.
        mean_kl: KL divergence from the trainer in nats, over the reported ids and all others as one.
        worst_kl: the largest at one place.
        told: how many ids, at most, a distribution reports.
    """

    questions: int
    mismatches: tuple[FirstMismatch, ...]
    places: int
    distance: float | None
    mean_kl: float | None
    worst_kl: float | None
    told: int


def measure(
    request: InferenceRequest,
    own: Sequence[Array],
    told: InferenceResponse,
    row_of: Callable[[int, int], Array],
) -> Drift:
    """Compare a response with the trainer.

    Args:
        own: the trainer's logits at each place.
        row_of: gives the trainer's logits at any place (prompt, token of its baseline).
    """
    mismatches = []
    for number, (ours, theirs) in enumerate(zip(request.baseline, told.ids, strict=True)):
        if (token := first_difference(ours, theirs)) is not None:
            mismatches.append(_first_mismatch(request, row_of(number, token), (number, token), (ours, theirs)))
    if told.following is None or not own:
        return Drift(len(request.prompts), tuple(mismatches), 0, None, None, None, 0)
    kls = [divergence(row, following) for row, following in zip(own, told.following, strict=True)]
    return Drift(
        questions=len(request.prompts),
        mismatches=tuple(mismatches),
        places=len(kls),
        distance=max(distance(row, following) for row, following in zip(own, told.following, strict=True)),
        mean_kl=float(np.mean(kls)),
        worst_kl=max(kls),
        told=max(len(following.ids) for following in told.following),
    )


def problems(drift: Drift, bound: Bound) -> list[str]:
    """What exceeds the bound, in words; a token may differ only where the trainer was at a tie within the bound."""
    found = []
    # `not <=` catches NaN.
    if drift.distance is not None and not drift.distance <= bound.distance:
        found.append(
            f"max log-prob error {drift.distance:.2g} (in logit std) (allowed: {bound.distance:.2g}, {bound.why})"
        )
    if drift.mean_kl is not None and not drift.mean_kl <= bound.kl:
        found.append(f"the mean KL divergence is {drift.mean_kl:.2g} nats (allowed: {bound.kl:.2g}, {bound.why})")
    # Two logits, each off by so many spreads, can swap places where they lie within twice that.
    far = [mismatch for mismatch in drift.mismatches if not mismatch.gap <= 2 * bound.distance * mismatch.spread]
    if far:
        worst = max(far, key=lambda mismatch: mismatch.gap)
        found.append(
            f"question {worst.question}, token {worst.token}: {_shown(worst.theirs)} instead of {_shown(worst.own)}, "
            f"which the trainer finds likelier by {worst.gap:.3g} nats"
        )
    return found


def first_difference(own: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first place where two answers differ, or None."""
    if tuple(own) == tuple(theirs):
        return None
    pairs = zip(own, theirs, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(own), len(theirs)))


def log_softmax(row: Array) -> Array:
    """Log probabilities of logits, in float64."""
    shifted = row.astype(np.float64) - row.max()
    logs: Array = shifted - np.log(np.exp(shifted).sum())
    return logs


def distance(row: Array, told: NextTokens) -> float:
    """Root mean square error of log probabilities, in standard deviations of the logits `row`."""
    own, theirs = _aligned(row, told)
    return float(np.sqrt(((own - theirs) ** 2).mean()) / row.std())


def divergence(row: Array, told: NextTokens) -> float:
    """KL divergence in nats from the logits `row` to the reported ids; all others count as one more id.

    Merging ids never raises a divergence, so that this is a lower bound of the one over all ids.
    """
    own, theirs = _aligned(row, told)
    shares = np.exp(own)
    total = float((shares * (own - theirs)).sum())
    if len(told.ids) < len(row):
        rest, left = (max(0.0, 1 - float(np.exp(logs).sum())) for logs in (own, theirs))
        if rest > 0:
            total += rest * (np.log(rest) - max(np.log(left) if left > 0 else _LEAST, _LEAST))
    return max(0.0, total)


def _aligned(row: Array, told: NextTokens) -> tuple[Array, Array]:
    """Both log probabilities of the reported ids, those reported without what all of them are off by.

    llama.cpp adds up the probabilities of a whole vocabulary in float32, one after another: with 49,152 words its log
    probabilities were all off by the same 1e-4, ten times as much as its logits. No more is taken out than such a sum
    can be off by, and nothing where every id is reported: then nobody else's sum is in it.
    """
    # Below `_LEAST` float32 knows no probability: both sides are held there, or -inf would decide alone.
    own, theirs = np.maximum(log_softmax(row)[told.ids], _LEAST), np.maximum(told.logs, _LEAST)
    if len(told.ids) < len(row):
        most = len(row) * STORED
        theirs = theirs + np.clip(np.average(own - theirs, weights=np.exp(own)), -most, most)
    return own, theirs


def _first_mismatch(
    request: InferenceRequest, row: Array, place: tuple[int, int], ids: tuple[Ids, Ids]
) -> FirstMismatch:
    """How near a tie the trainer was; an answer that has ended stands for its likeliest stop id."""
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
