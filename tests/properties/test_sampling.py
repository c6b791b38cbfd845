"""Laws of drawing the next token: each as often as its chance says, and the same for the same seed."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.backends.generate import greedy, sampler
from finetune_strategies.profiles import examples

LOGITS = np.log([[0.5, 0.05, 0.25, 0.15, 0.05]])
DRAWS = 20_000
DEVIATIONS = 5
"""So many standard deviations a frequency may be off: less than one of a million draws of a fair sampler is."""


def frequencies(temperature: float, top_p: float = 1.0) -> list[float]:
    """How often each token comes, of many draws."""
    drawn = sampler(temperature, top_p, seed=0)(np.repeat(LOGITS, DRAWS, axis=0))
    return [float((drawn == token).mean()) for token in range(LOGITS.shape[1])]


@pytest.mark.parametrize(
    ("temperature", "top_p", "chances"),
    [
        (1.0, 1.0, [0.5, 0.05, 0.25, 0.15, 0.05]),
        (1.0, 0.5, [1, 0, 0, 0, 0]),
        (1.0, 0.51, [2 / 3, 0, 1 / 3, 0, 0]),
        (1.0, 0.8, [0.5 / 0.9, 0, 0.25 / 0.9, 0.15 / 0.9, 0]),
        (0.5, 1.0, [0.25 / 0.34, 0.0025 / 0.34, 0.0625 / 0.34, 0.0225 / 0.34, 0.0025 / 0.34]),
        (1e-300, 1.0, [1, 0, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_their_chances_say(temperature: float, top_p: float, chances: list[float]) -> None:
    """Chances are those of the logits by temperature; with top_p the fewest likeliest that reach it share them all."""
    for found, chance in zip(frequencies(temperature, top_p), chances, strict=True):
        assert abs(found - chance) <= DEVIATIONS * math.sqrt(chance * (1 - chance) / DRAWS)


@given(st.integers(0, 2**64), st.floats(1e-3, 100), st.floats(1e-6, 1), st.integers(1, 5), st.integers(1, 50))
@examples(0.3)
def test_draws_are_those_of_their_seed(seed: int, temperature: float, top_p: float, rows: int, words: int) -> None:
    """The same seed draws the same tokens, call after call; the least top_p always takes the likeliest."""
    random = np.random.default_rng(1)
    calls = [random.normal(size=(rows, words)).astype(np.float32) * 9 for _ in range(3)]
    first, second = (sampler(temperature, top_p, seed=seed) for _ in range(2))
    for logits in calls:
        drawn = first(logits)
        assert drawn.tolist() == second(logits).tolist()
        assert drawn.shape == (rows,)
        assert ((drawn >= 0) & (drawn < words)).all()
        least = sampler(temperature, 1e-9, seed=seed)(logits)
        assert least.tolist() == greedy(logits).tolist()


def test_seeds_differ() -> None:
    """Other seeds draw otherwise, 0 among them."""
    many = np.repeat(LOGITS, 50, axis=0)
    assert len({tuple(sampler(1.0, seed=seed)(many)) for seed in range(5)}) == 5
