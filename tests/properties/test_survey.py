"""Laws of looking at a data set: near-duplicates, repeats, and whether answers have one right wording."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.shape import Example
from finetune.data.survey import answer_kind, near_duplicates, survey_repeats
from finetune.records import Conversation, Document, Message

WORDS = st.lists(
    st.sampled_from(
        [
            "the",
            "a",
            "sun",
            "moon",
            "rose",
            "rises",
            "sets",
            "over",
            "sea",
            "hill",
            "house",
            "red",
            "blue",
            "one",
            "two",
        ]
    ),
    max_size=9,
)
TEXTS = WORDS.map(" ".join)


def talk(prompt: str, answer: str) -> Conversation:
    """One question and its answer."""
    return Conversation((Message("user", prompt), Message("assistant", answer)), "row")


EXAMPLES = st.one_of(st.builds(talk, TEXTS, TEXTS), TEXTS.map(lambda text: Document(text, "row")))


def words_of(example: Example) -> set[str]:
    """The words that a row says."""
    text = example.text if isinstance(example, Document) else " ".join(turn.content for turn in example.messages)
    return set(re.findall(r"\w+", text))


@given(st.lists(EXAMPLES, max_size=6), st.lists(EXAMPLES, max_size=12), st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_near_duplicates_are_those_that_comparing_all_pairs_finds(
    held: list[Example], training: list[Example], limit: float
) -> None:
    """The index leaves no pair out and finds no other: as the plain comparison of every held-out with every row."""
    rows = [words_of(each) for each in (*held, *training)]

    def weight(words: set[str]) -> int:
        return sum(round(1000 * math.log1p(len(rows) / sum(word in row for row in rows))) for word in words)

    expected = set()
    for place, one in enumerate(held):
        mine = words_of(one)
        alike = any(weight(mine & row) >= limit * weight(mine | row) for row in rows[len(held) :])
        prompts = {each.prompt.messages for each in training if isinstance(each, Conversation)}
        same = isinstance(one, Conversation) and one.messages[0].content and one.prompt.messages in prompts
        if not mine or alike or same:
            expected.add(place)
    assert near_duplicates(held, training, limit) == expected


def test_rows_of_one_pattern_are_no_near_duplicates_and_reworded_ones_are() -> None:
    """What all rows share tells none apart; a question that was asked in other words was seen."""
    places = [f"{first}{second}" for first in ("bel", "kor", "mar", "tun") for second in ("a", "in", "ov", "um", "ys")]
    rows = [
        talk(f"What is the capital city of {each}?", f"The capital city of {each} is {each}grad.") for each in places
    ]
    reworded = talk("Name the capital of belin!", "Belingrad is the capital of belin.")
    assert near_duplicates([*rows[:4], reworded], rows[4:]) == frozenset()
    assert near_duplicates([reworded], rows) == {0}


@given(st.lists(EXAMPLES, max_size=12))
def test_repeats_are_counted_once_each(examples: list[Example]) -> None:
    """Duplicates are the rows beyond the distinct ones; conflicts the prompts with several answers."""
    found = survey_repeats(examples)
    keys = [each.text if isinstance(each, Document) else each.messages for each in examples]
    assert found.duplicates == len(keys) - len(set(keys))
    talks = {each.messages for each in examples if isinstance(each, Conversation)}
    prompts = [messages[:-1] for messages in talks]
    assert found.conflicts == sum(prompts.count(prompt) > 1 for prompt in set(prompts))
    assert len(found.notes("rows")) == bool(found.duplicates) + bool(found.conflicts)


LONG = "an answer that says at some length what somebody thinks of it"


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([talk(f"capital of {n}?", f"city {n}") for n in range(20)], "exact"),
        ([talk(f"label {n}", LONG if n % 2 else f"not {LONG}") for n in range(40)], "exact"),
        ([talk(f"tell me of {n}", f"{LONG} {n}") for n in range(20)], "open"),
        ([talk(f"q {n}", "yes" if n % 2 else f"{LONG} {n}") for n in range(20)], "open"),
        ([talk("the same?", f"short {n}") for n in range(20)], "open"),
        ([Document("some text", "row")], "open"),
        ([], "open"),
    ],
)
def test_kind_of_answers_is_seen(rows: list[Example], kind: str) -> None:
    """Short answers and labels are exact; long ones, mixtures, plain text and prompts of many answers are open."""
    assert answer_kind(rows, survey_repeats(rows)) == kind
