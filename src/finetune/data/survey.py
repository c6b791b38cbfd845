"""What a data set is like: whether its answers are exact, and what it says twice."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.data.shape import Example
from finetune.records import Conversation

AnswerKind = Literal["exact", "open"]
SHORT_ANSWER = 6
"""Up to how many words an answer can be the only right one: a name, a number, a label."""
_EXACT_SHARE = 0.9


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
    exact = sum(len(each.answer.split()) <= SHORT_ANSWER or again[each.answer] >= often for each in conversations)
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
