"""Answers, whatever computes the logits: which prompts go together, which token comes next, where an answer ends."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.ports import ChooseTokens

Prompts = Sequence[Sequence[int]]
_ASKED_TOGETHER = 64


def answer_by_length(
    prompts: Prompts, most: int, context: int, answer: Callable[[Prompts, int], list[list[int]]]
) -> list[list[int]]:
    """The answers to all prompts, in their order.

    Only prompts of equal length go through the model together: no padding, so no prompt can change another's answer.

    Args:
        most: how many tokens an answer may have; fewer where the model's `context` is full before.
        answer: gives the answers to prompts of one length, of at most so many tokens.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    answers: list[list[int]] = [[] for _ in prompts]
    for length, members in by_length.items():
        room = min(most, context - length)
        for start in range(0, len(members) if room > 0 else 0, _ASKED_TOGETHER):
            asked = members[start : start + _ASKED_TOGETHER]
            for index, given in zip(asked, answer([prompts[each] for each in asked], room), strict=True):
                answers[index] = given
    return answers


def until_stops(words: Iterable[Sequence[int]], rows: int, stop_ids: Sequence[int]) -> list[list[int]]:
    """What each row says before its first stop token, of words that come for all rows at once.

    No more words are taken than are needed: taking one is what costs.
    """
    said: list[list[int]] = [[] for _ in range(rows)]
    open_ = set(range(rows))
    for each in words:
        open_ -= {row for row in open_ if each[row] in stop_ids}
        if not open_:
            break
        for row in open_:
            said[row].append(int(each[row]))
    return said


def greedy(logits: NDArray[Any]) -> NDArray[np.int64]:
    """The likeliest token of each row."""
    likeliest: NDArray[np.int64] = logits.argmax(axis=-1)
    return likeliest


def sampler(temperature: float, top_p: float = 1.0, *, seed: int) -> ChooseTokens:
    """Draws tokens by their chances, the same for the same seed, logits and order of calls.

    Args:
        temperature: what logits are divided by, above 0; below 1 likely tokens become likelier.
        top_p: only the fewest likeliest tokens are drawn from whose chances add up to this share
            (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751); 1 for all.
    """
    random = np.random.default_rng(seed)

    def choose(logits: NDArray[Any]) -> NDArray[np.int64]:
        order = np.argsort(-logits, axis=-1, kind="stable")
        ordered = np.take_along_axis(logits, order, axis=-1).astype(np.float64)
        with np.errstate(over="ignore"):  # a tiny temperature makes all but the likeliest impossible, as it should
            chances = np.exp((ordered - ordered[:, :1]) / temperature)
        chances /= chances.sum(axis=-1, keepdims=True)
        before = chances.cumsum(axis=-1) - chances
        chances[before >= top_p] = 0.0
        reached = chances.cumsum(axis=-1)
        drawn = random.random((len(logits), 1)) * reached[:, -1:]
        places = np.minimum((reached <= drawn).sum(axis=-1), np.count_nonzero(chances, axis=-1) - 1)
        return np.take_along_axis(order, places[:, None], axis=-1)[:, 0]

    return choose
