"""What a data set is like: whether its answers are exact, what it says twice, and what a held-out row repeats."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.data.shape import Example
from finetune.records import Conversation, Message

AnswerKind = Literal["exact", "open"]
NEAR_DUPLICATE = 0.4
"""From which share of what two rows say together, rare words weighing more, they say nearly the same.

In a public split of question and answer rows, those above it could be told from training alone. What all rows share
(a pattern, a table's header) weighs next to nothing: rows of one pattern that ask of different things are none.
"""
_EXACT_WORDS = 6
"""Up to how many words an answer can be the only right one: a name, a number, a label."""
_EXACT_SHARE = 0.9
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class SharedText:
    """What rows have of one kind: the text that all of them share, or "", how many have one, and how many differ."""

    text: str
    rows: int
    different: int


def shared_text(texts: Sequence[str]) -> SharedText:
    """What is shared of a text that each row has; "" is none."""
    different = set(texts) - {""}
    shared = texts[0] if len(set(texts)) == 1 else ""
    return SharedText(shared, sum(map(bool, texts)), len(different))


def system_prompt(conversation: Conversation) -> str:
    """The system prompt that a conversation begins with, or ""."""
    first = conversation.messages[0]
    return first.content if first.role == "system" else ""


@dataclass(frozen=True, slots=True)
class Repeats:
    """How many rows say what an earlier one says, and how many prompts have several answers."""

    duplicates: int
    conflicts: int

    def notes(self, name: str) -> list[str]:
        """A sentence for each kind that there is."""
        found = [
            (self.duplicates, "row(s) say word for word what an earlier row says"),
            (self.conflicts, "prompt(s) stand there with different answers: no model can learn all of them"),
        ]
        return [f"{name}: {count} {what}" for count, what in found if count]


def answer_kind(examples: Sequence[Example], repeats: Repeats) -> AnswerKind:
    """`exact` where each prompt has one right answer, so that answers can be compared word for word; else `open`.

    Nine answers in ten are short, or such as come again and again as labels do, and prompts have one answer each.

    Args:
        repeats: what `survey_repeats` says of them.
    """
    conversations = [example for example in examples if isinstance(example, Conversation)]
    if not conversations or len(conversations) < len(examples):
        return "open"
    again = Counter(conversation.answer for conversation in conversations)
    often = max(3, len(conversations) // 20)
    exact = sum(len(each.answer.split()) <= _EXACT_WORDS or again[each.answer] >= often for each in conversations)
    prompts = len({each.prompt.messages for each in conversations})
    several = repeats.conflicts > (1 - _EXACT_SHARE) * prompts
    return "exact" if exact >= _EXACT_SHARE * len(conversations) and not several else "open"


def survey_repeats(examples: Iterable[Example]) -> Repeats:
    """Count rows that are repeated, and prompts whose answers differ."""
    seen: set[object] = set()
    answers: defaultdict[object, set[str]] = defaultdict(set)
    duplicates = 0
    for example in examples:
        key: object = example.messages if isinstance(example, Conversation) else example.text
        duplicates += key in seen
        seen.add(key)
        if isinstance(example, Conversation):
            answers[example.prompt.messages].add(example.answer)
    return Repeats(duplicates, sum(len(found) > 1 for found in answers.values()))


def near_duplicates(
    held_out: Sequence[Example], training: Sequence[Example], limit: float = NEAR_DUPLICATE
) -> frozenset[int]:
    """The places of held-out rows that say nearly what a training row says: they do not count as unseen.

    Of two rows the weight of the shared words is compared with that of all words (weighted Jaccard). A word that
    `count` of `n` rows have weighs log(1 + n / count), in whole thousandths, so that sums are exact. Rows as alike as
    `limit` share one of the rarest words of each: those down to where the rest weighs less than `limit` of the row.
    Only rows that do are compared.

    Source: Bayardo, Ma and Srikant, 2007, "Scaling up all pairs similarity search".
    """
    words = [_words(example) for example in held_out]
    counts = Counter(word for example in (*held_out, *training) for word in _words(example))
    total = len(held_out) + len(training)
    weights = {word: round(1000 * math.log1p(total / count)) for word, count in counts.items()}

    def weight(of: Iterable[str]) -> int:
        return sum(weights[word] for word in of)

    def rarest(each: frozenset[str]) -> Iterator[str]:
        rest = whole = weight(each)
        for word in sorted(each, key=lambda word: (-weights[word], word)):
            if rest < limit * whole:
                return
            yield word
            rest -= weights[word]

    homes: defaultdict[str, list[int]] = defaultdict(list)
    for place, each in enumerate(words):
        for word in rarest(each):
            homes[word].append(place)
    found: set[int] = {place for place, each in enumerate(words) if not each}
    for example in training:
        other = _words(example)
        near = {place for word in rarest(other) for place in homes.get(word, ())} - found
        found |= {place for place in near if weight(words[place] & other) >= limit * weight(words[place] | other)}
    # A prompt that was trained on is not unseen either, whatever it is answered here.
    prompts = {_prompt(example) for example in training}
    return frozenset(found | {place for place, each in enumerate(held_out) if _prompt(each) in prompts - {()}})


def _prompt(example: Example) -> tuple[str, ...]:
    return tuple(_spoken(example.prompt.messages)) if isinstance(example, Conversation) else ()


def _words(example: Example) -> frozenset[str]:
    if isinstance(example, Conversation):
        return frozenset(_spoken(example.messages))
    return frozenset(_WORD.findall(example.text.casefold()))


def _spoken(messages: Sequence[Message]) -> Iterator[str]:
    """The words of all turns; a system prompt is the same for most rows and tells none apart."""
    return (word for turn in messages if turn.role != "system" for word in _WORD.findall(turn.content.casefold()))
