"""Which messages of a conversation are learned, and which characters of its rendered text."""

from bisect import bisect, bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Literal

from finetune.records import Conversation

TrainOn = Literal["all", "last", "everything"]
Stretch = tuple[int, int]
"""Where something begins in a text, and where it ends."""


def answers_of(talk: Conversation, train_on: TrainOn = "all") -> list[int]:
    """The places of the answers that are learned: what a row says of a message counts before the settings."""
    answers = [index for index, message in enumerate(talk.messages) if message.role == "assistant"]
    chosen = set(answers[-1:] if train_on == "last" else answers)
    said = {index: talk.messages[index].trained for index in answers}
    return [index for index in answers if said[index] or (said[index] is None and index in chosen)]


def marked(talk: Conversation, *, answers: bool, trained: bool) -> list[int]:
    """The places of answers, or of other messages, whose row says that they are learned, or that they are not."""
    said = ((message.role == "assistant", message.trained) for message in talk.messages)
    return [index for index, each in enumerate(said) if each == (answers, trained)]


@dataclass(frozen=True, slots=True)
class Learned:
    """What of a text is learned, and which of that is an answer, from its prompt's end to its terminator's."""

    answers: tuple[int, ...] = ()
    """Where answers begin and end, in turn."""
    changes: tuple[int, ...] = ()
    """Where it begins to be learned, and where it ends, in turn."""
    begins: bool = False
    """Whether the text begins with what is learned: then `changes` says where it is not."""

    @classmethod
    def of(cls, answers: Iterable[Stretch], stretches: Iterable[Stretch], *, but: bool) -> "Learned":
        """Learn these stretches alone, or all `but` them."""
        return cls(tuple(chain(*answers)), tuple(chain(*sorted(stretches))), but)

    def at(self, place: int) -> bool:
        """Whether the character at a place is learned."""
        return (bisect(self.changes, place) % 2 == 1) != self.begins

    def role(self, place: int) -> str:
        """Whose the markup at a place is."""
        return "assistant" if bisect(self.answers, place) % 2 else "markup"

    def pieces(self, begin: int, end: int) -> list[Stretch]:
        """A stretch cut wherever something changes in it."""
        inside = {begin, end}
        for places in (self.answers, self.changes):  # sorted: a long conversation is not gone through for each piece
            inside.update(places[bisect(places, begin) : bisect_left(places, end)])
        return list(pairwise(sorted(inside)))
