"""Laws of drift: how far one way to compute a model is from another, in answers, tokens and distributions."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.evidence.drift import (
    Bound,
    Drift,
    InferenceRequest,
    InferenceResponse,
    NextTokens,
    distance,
    divergence,
    first_difference,
    log_softmax,
    measure,
    problems,
)
from finetune_strategies.profiles import examples

STOP = 1
seeds = st.integers(0, 2**32 - 1)


def rows(seed: int, count: int = 2, width: int = 12, spread: float = 3.0) -> Any:
    """Logits of random models."""
    return np.random.default_rng(seed).normal(0.0, spread, (count, width))


def told_of(row: Any, most: int | None = None) -> NextTokens:
    """What a way tells that computes these logits: the likeliest ids, or all."""
    ids = np.argsort(-row)[:most]
    return NextTokens(ids, log_softmax(row)[ids])


@given(seeds, st.integers(2, 40), st.floats(0.01, 30.0))
def test_divergence_of_all_ids_is_kl(seed: int, width: int, spread: float) -> None:
    """Over every id, in any order, it is sum p (log p - log q); of a model from itself it is nothing."""
    own, other = rows(seed, width=width, spread=spread)
    shares = np.exp(log_softmax(own))
    textbook = float((shares * (log_softmax(own) - log_softmax(other))).sum())
    # float32 knows nothing smaller than e**-103: below, a way cannot tell how unlikely an id is to it.
    if log_softmax(other).min() > -100:
        assert divergence(own, told_of(other)) == pytest.approx(textbook, rel=1e-9, abs=1e-12)
    assert divergence(own, told_of(own)) == pytest.approx(0.0, abs=1e-12)
    assert distance(own, told_of(own)) == pytest.approx(0.0, abs=1e-12)


@given(seeds, st.integers(1, 11))
def test_divergence_of_some_ids_is_no_more_than_of_all(seed: int, most: int) -> None:
    """What is not told counts as one more id: the divergence is at most that of all ids, and never below 0.

    But for what a sum in float32 can be off by.
    """
    own, other = rows(seed)
    part, whole = divergence(own, told_of(other, most)), divergence(own, told_of(other))
    assert 0.0 <= part <= whole + len(own) * 2.0**-24
    assert divergence(own, told_of(own, most)) == pytest.approx(0.0, abs=1e-12)


@given(seeds, st.floats(1e-6, 1.0))
def test_distance_is_in_spreads(seed: int, size: float) -> None:
    """Log probabilities that are off by some share of the logits' spread are that far off, however large logits are."""
    row = rows(seed, 1)[0]
    off = NextTokens(np.arange(len(row)), log_softmax(row) + size * row.std())
    assert distance(row, off) == pytest.approx(size, rel=1e-6)
    assert distance(1000 * row, NextTokens(np.array([int(row.argmin())]), np.array([-np.inf]))) < np.inf


@given(seeds, st.floats(-1.0, 1.0))
def test_a_sum_in_float32_is_not_taken_for_the_model(seed: int, share: float) -> None:
    """What all reported ids are off by is left out as far as a float32 sum can be off, and no further."""
    row = rows(seed, 1, width=400)[0]
    told, most = told_of(row, 50), 400 * 2.0**-24
    summed = NextTokens(told.ids, told.logs + share * most)
    assert distance(row, summed) == pytest.approx(0.0, abs=1e-9)
    assert divergence(row, summed) == pytest.approx(0.0, abs=1e-9)
    off = NextTokens(told.ids, told.logs + 3 * most)
    assert distance(row, off) == pytest.approx(2 * most / row.std(), rel=1e-3)


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6))
@example([1, 2], [1, 2, 3])
@example([], [])
def test_first_difference_is_where_answers_part(own: list[int], theirs: list[int]) -> None:
    """Up to there they are alike, and there they are not, or one of them has ended."""
    place = first_difference(own, theirs)
    if place is None:
        assert own == theirs
    else:
        assert own[:place] == theirs[:place]
        assert own[place : place + 1] != theirs[place : place + 1]


@given(st.lists(st.lists(st.integers(0, 5), max_size=8), min_size=1, max_size=4), st.integers(0, 6))
def test_answers_are_cut_alike(answers: list[list[int]], most: int) -> None:
    """An answer ends before its first stop and is no longer than asked for, and cutting again changes nothing."""
    asked = InferenceRequest(tuple((2,) for _ in answers), tuple(most for _ in answers), (STOP,))
    cut = asked.cut(answers)
    assert all(list(ids) == answer[: len(ids)] for ids, answer in zip(cut, answers, strict=True))
    assert all(STOP not in ids and len(ids) <= most for ids in cut)
    ends = zip(cut, answers, strict=True)
    assert all(len(ids) == most or answer[len(ids) :][:1] in ([], [STOP]) for ids, answer in ends)
    assert asked.cut(cut) == cut


def judged(off: float, *, token: int | None = None, gap: float = 0.0, bound: float = 0.1) -> tuple[Drift, list[str]]:
    """A model of one question whose logits are off by so many spreads, and which says another token at place 1."""
    path = (4, 5, 6)
    truth = rows(0, 4)
    for place, chosen in enumerate((*path, STOP)):
        truth[place][chosen] = truth[place].max() + 1.0
    if token is not None:
        truth[1][token] = truth[1][path[1]] - gap * truth[1].std()
    places = tuple((0, place) for place in range(4))
    asked = InferenceRequest(((2, 3),), (8,), (STOP,), (path,), places)
    noise = np.where(np.arange(truth.shape[1]) % 2, 1.0, -1.0)
    following = tuple(told_of(row + off * row.std() * noise) for row in truth)
    said = path if token is None else (path[0], token, 9)
    drift = measure(asked, list(truth), InferenceResponse((said,), following), lambda number, place: truth[place])
    return drift, problems(drift, Bound(bound, bound, "as told"))


def test_drift_within_the_bound_holds_and_beyond_it_is_told() -> None:
    """Equal is equal; half of the bound holds; twice the bound is named with what is measured and allowed."""
    drift, found = judged(0.0)
    assert (drift.mismatches, drift.places, drift.told, found) == ((), 4, 12, [])
    assert judged(0.05)[1] == []
    [said] = [words for words in judged(0.2)[1] if "log-prob error" in words]
    assert "allowed: 0.1" in said
    assert any("KL" in words for words in judged(2.0)[1])


def test_another_token_is_held_to_how_near_a_tie_it_was() -> None:
    """A token that differs is told with its place and both ids; at a tie it is no fault, far from one it is."""
    near, found = judged(0.0, token=7, gap=0.1)
    [mismatch] = near.mismatches
    assert (mismatch.question, mismatch.token, mismatch.own, mismatch.theirs) == (0, 1, 5, 7)
    assert mismatch.gap == pytest.approx(0.1 * mismatch.spread, rel=0.2)
    assert found == []
    far, found = judged(0.0, token=7, gap=0.5)
    assert [mismatch.token for mismatch in far.mismatches] == [1]
    assert "question 0, token 1: token 7 instead of token 5" in found[0]


def test_a_way_that_tells_no_distribution_is_held_to_its_answers_alone() -> None:
    """Without distributions nothing is made up of them: no number, and answers are still judged."""
    asked = InferenceRequest(((2,),), (4,), (STOP,), ((3,),), ((0, 0),))
    row = rows(1, 1)[0]
    drift = measure(asked, [row], InferenceResponse(((3,),), None), lambda number, place: row)
    assert (drift.places, drift.distance, drift.mean_kl, drift.worst_kl) == (0, None, None, None)
    assert problems(drift, Bound(0.0, 0.0, "")) == []
    row[3] = row.max() + 5
    other = measure(asked, [row], InferenceResponse(((4,),), None), lambda number, place: row)
    assert len(problems(other, Bound(0.1, 0.1, ""))) == 1


@examples(1 / 4)
@given(seeds)
def test_what_is_not_a_number_is_no_drift_that_holds(seed: int) -> None:
    """A way whose log probabilities are NaN is broken, not equal."""
    row = rows(seed, 1)[0]
    asked = InferenceRequest(((2,),), (4,), (STOP,), ((3,),), ((0, 0),))
    nothing = NextTokens(np.arange(12), np.full(12, np.nan))
    assert problems(
        measure(asked, [row], InferenceResponse(((3,),), (nothing,)), lambda number, place: row), Bound(1e9, 1e9, "")
    )
