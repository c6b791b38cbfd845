"""Laws of scoring: an answer is right when it is the expected one, all of it and nothing more."""

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import assume, example, given
from hypothesis import strategies as st

from finetune.evidence.answers import ask, normalise
from finetune.records import Question
from finetune_strategies.conversations import texts


@dataclass
class Parrot:
    """A session that gives the answers it was told, as the numbers of characters."""

    answers: list[str]

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[list[int]]:
        """The answers, in the order of the prompts."""
        return [[ord(letter) for letter in self.answers[ids[0]]] for ids in prompts]


def score(expected: str, said: str) -> bool:
    """Whether an answer counts as right."""
    questions = [Question((0,), "?", expected)]
    scores = ask(
        Parrot([said]),  # type: ignore[arg-type]
        questions,
        lambda ids: "".join(map(chr, ids)),
        max_new_tokens=9,
        stop_ids=(),
    )
    assert scores.answers[0].given == said.strip()
    return scores.answers[0].right


@given(texts(), texts())
@example("Oslo", " Oslo Oslo")
@example("12", "123")
@example("Oslo", ", Norway")
def test_answer_that_goes_on_is_wrong(expected: str, more: str) -> None:
    """A model that says the right words and does not stop there has not learned the answer."""
    assume(normalise(expected))
    assume(normalise(expected + more) != normalise(expected))
    assert score(expected, expected)
    assert not score(expected, expected + more)


@given(st.lists(texts(), min_size=1, max_size=5, unique_by=normalise))
def test_answers_are_scored_against_their_own_question(expected: list[str]) -> None:
    """Each answer is held to its own question's: all right in order, and all wrong when each says another's."""
    questions = [Question((number,), f"{number}?", text) for number, text in enumerate(expected)]

    def right(said: list[str]) -> int:
        scores = ask(
            Parrot(said),  # type: ignore[arg-type]
            questions,
            lambda ids: "".join(map(chr, ids)),
            max_new_tokens=9,
            stop_ids=(),
        )
        return scores.right

    assert right(expected) == len(expected)
    assert right([*expected[1:], expected[0]]) == (1 if len(expected) == 1 else 0)
