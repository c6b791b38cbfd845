"""Laws of looking at a data set: repeats, and whether answers have one right wording."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.shape import Example
from finetune.data.survey import answer_kind, survey_repeats
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
    assert answer_kind(survey_repeats(rows)) == kind
