"""What the trainer answers, in float32, and what every other way is asked about it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from finetune.evidence.answering import Row, answers_of, rows_of
from finetune.evidence.drift import Asked, Drift, Ids, Told, measure
from finetune.ports import Session

MOST_PLACES = 256
"""At how many places of the trainer's own answers distributions are compared."""


@dataclass(frozen=True)
class Truth:
    """The trainer with its answers; `asked` is what every other way is asked."""

    session: Session
    asked: Asked

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The trainer's logits at each place."""
        return rows_of(self.session, self.asked)

    def drift(self, told: Told) -> Drift:
        """How far from the trainer a way is that told this."""
        return measure(self.asked, self.rows, told, self._row)

    def _row(self, number: int, token: int) -> Row:
        [row] = rows_of(self.session, replace(self.asked, places=((number, token),)))
        return row


def tell_truth(session: Session, prompts: Sequence[Ids], steps: int, stops: Ids, context: int) -> Truth:
    """Let the trainer answer.

    Args:
        context: how many tokens the model reads; an answer ends there, and to a prompt as long as that there is none.
    """
    rooms = tuple(max(0, min(steps, context - len(prompt))) for prompt in prompts)
    asked = Asked(tuple(prompts), rooms, stops)
    path = answers_of(session, asked)
    # Each token of an answer was chosen at a place, and so was its end, where it came before there was no room.
    places = [
        (number, token)
        for number, (ids, room) in enumerate(zip(path, rooms, strict=True))
        for token in range(min(len(ids) + 1, room))
    ]
    stride = -(-len(places) // MOST_PLACES) or 1
    return Truth(session, replace(asked, path=path, places=tuple(places[::stride])))
