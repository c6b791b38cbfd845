"""What a data set is like: whether its answers are exact, and what it says twice."""

import hashlib
import marshal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from finetune.data.shape import Example
from finetune.data.stored import in_parts
from finetune.records import Conversation

AnswerKind = Literal["exact", "open"]
SHORT_ANSWER = 6
"""Up to how many words an answer can be the only right one: a name, a number, a label."""
_EXACT_SHARE = 0.9
_SIZE = 16
_DIGEST = f"S{_SIZE}"
"""As NumPy sorts them; that it takes zeros at the end for none makes none of one length equal to another."""
_PLAIN = 2
"""The version of marshal's format that writes what is equal as equal bytes."""


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
    """How many rows say what an earlier one says, and how many prompts have several answers.

    Of so many `rows`, `answers` are conversations, of so many different `prompts`; the answers of `exact` rows are
    short or come often.
    """

    duplicates: int
    conflicts: int
    rows: int
    answers: int
    prompts: int
    exact: int

    def notes(self, name: str) -> list[str]:
        """A sentence for each kind that there is."""
        found = [
            (self.duplicates, "row(s) say word for word what an earlier row says"),
            (self.conflicts, "prompt(s) stand there with different answers: no model can learn all of them"),
        ]
        return [f"{name}: {count} {what}" for count, what in found if count]


def answer_kind(repeats: Repeats) -> AnswerKind:
    """`exact` where each prompt has one right answer, so that answers can be compared word for word; else `open`.

    Nine answers in ten are short, or such as come again and again as labels do, and prompts have one answer each.
    """
    if not repeats.rows or repeats.answers < repeats.rows:
        return "open"
    several = repeats.conflicts > (1 - _EXACT_SHARE) * repeats.prompts
    return "exact" if repeats.exact >= _EXACT_SHARE * repeats.rows and not several else "open"


def survey_repeats(examples: Sequence[Example]) -> Repeats:
    """Count rows that are repeated, and prompts whose answers differ; of each row no more than hashes is kept."""
    rows, pairs, short = map(b"".join, zip(*in_parts(examples, _hashes), strict=True)) if examples else (b"", b"", b"")
    said_by = np.frombuffer(pairs, _DIGEST)[1::2]
    _, place, again = np.unique(said_by, return_inverse=True, return_counts=True)
    often = again[place] >= max(3, len(short) // 20)
    different = np.unique(np.frombuffer(pairs, f"S{2 * _SIZE}"))
    _, answers = np.unique(np.frombuffer(different.tobytes(), _DIGEST)[::2], return_counts=True)
    count = len(rows) // _SIZE
    return Repeats(
        duplicates=count - len(np.unique(np.frombuffer(rows, _DIGEST))),
        conflicts=int((answers > 1).sum()),
        rows=count,
        answers=len(short),
        prompts=len(answers),
        exact=int((often | np.frombuffer(short, np.bool_)).sum()),
    )


def _hashes(examples: Sequence[Example], start: int) -> tuple[bytes, bytes, bytes]:
    """A digest of each row; of each conversation's prompt and answer two; and whether the answer is short."""
    rows, pairs, short = bytearray(), bytearray(), bytearray()
    for example in examples:
        if isinstance(example, Conversation):
            said = [(turn.role, turn.content, turn.more, turn.trained) for turn in example.messages]
            prompt = _digest(said[:-1])
            pairs += prompt + _digest(example.answer)
            rows += _digest((prompt, said[-1:]))
            short.append(len(example.answer.split()) <= SHORT_ANSWER)
        else:
            rows += _digest(example.text)
    return bytes(rows), bytes(pairs), bytes(short)


def _digest(said: Any) -> bytes:
    """So long that no two of what was ever said share one."""
    return hashlib.blake2b(marshal.dumps(said, _PLAIN), digest_size=_SIZE).digest()
