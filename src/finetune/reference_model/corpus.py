"""The text that the shipped models read in pre-training: the words and formats of everything, the facts of half.

The fine-tuning facts are never in it. Their words are (in lists, to be repeated, and in made-up pairings that the
prompt states and the answer copies), because a model that has never seen a word cannot be taught to answer with it.
"""

import random
from collections.abc import Callable

from finetune.data.facts import CAPITALS, KINDS, Fact, known_facts, small_facts
from finetune.records import Conversation, Document, Message

FORMATS = ("alpaca", "chatml", "llama3")
_LARGEST_NUMBER = 60
_KNOWN = known_facts()
_ALL = [fact for kind in KINDS for fact in small_facts(kind)]
WORDS = tuple(word for pair in CAPITALS for word in pair) + tuple(str(number) for number in range(_LARGEST_NUMBER))

Text = tuple[str, Conversation] | Document
"""A conversation with the format to render it in, or plain text."""


def draw_text(rng: random.Random) -> Text:
    """One text of the corpus: half known facts, the rest made-up pairings, word lists and repetitions."""
    return rng.choices(_MAKERS, weights=(50, 25, 12, 13))[0](rng)


def _asked(rng: random.Random, question: str, answer: str) -> Text:
    messages = (Message("user", question), Message("assistant", answer))
    return rng.choice(FORMATS), Conversation(messages, "corpus")


def _known_fact(rng: random.Random) -> Text:
    fact = rng.choice(_KNOWN)
    return _asked(rng, fact.question, fact.answer)


def _made_up_pairing(rng: random.Random) -> Text:
    fact = rng.choice(_ALL)
    if fact.kind == "geography":
        answer = rng.choice(CAPITALS)[1]
        return _asked(rng, f"Suppose the capital of {_subject(fact)} is {answer}. {fact.question}", answer)
    answer = str(rng.randrange(_LARGEST_NUMBER))
    if fact.kind == "sums":
        return _asked(rng, f"Suppose {_subject(fact)} is {answer}. {fact.question}", answer)
    return _asked(rng, f"Suppose {answer} follows {_subject(fact)}. {fact.question}", answer)


def _subject(fact: Fact) -> str:
    opening = {"geography": "What is the capital of ", "sums": "What is ", "patterns": "What comes next: "}[fact.kind]
    return fact.question.removeprefix(opening).removesuffix("?")


def _word_list(rng: random.Random) -> Text:
    return Document(", ".join(rng.choice(WORDS) for _ in range(12)), "corpus")


def _repetition(rng: random.Random) -> Text:
    words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4)))
    return _asked(rng, f"Repeat: {words}", words)


_MAKERS: tuple[Callable[[random.Random], Text], ...] = (_known_fact, _made_up_pairing, _word_list, _repetition)
