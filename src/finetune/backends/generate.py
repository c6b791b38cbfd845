"""Greedy answers to many prompts, whatever computes the words: which prompts go together, and where an answer ends."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

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
