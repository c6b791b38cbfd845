"""The trainer's float32 answers, and the request that every other path gets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from finetune.evidence.answering import LogitsRow, answers_of, rows_of
from finetune.evidence.drift import Drift, Ids, InferenceRequest, InferenceResponse, measure
from finetune.ports import Session

MOST_PLACES = 256
"""At how many places of the trainer's own answers distributions are compared."""


@dataclass(frozen=True)
class Baseline:
    """The trainer with its answers; `request` goes to every other path."""

    session: Session
    request: InferenceRequest

    @cached_property
    def rows(self) -> tuple[LogitsRow, ...]:
        """The trainer's logits at each place."""
        return rows_of(self.session, self.request)

    @property
    def sequences(self) -> tuple[Ids, ...]:
        """Each prompt with the trainer's answer."""
        return tuple((*prompt, *more) for prompt, more in zip(self.request.prompts, self.request.baseline, strict=True))

    def drift(self, response: InferenceResponse) -> Drift:
        """How far this response is from the trainer."""
        return measure(self.request, self.rows, response, self._row)

    def _row(self, number: int, token: int) -> LogitsRow:
        [row] = rows_of(self.session, replace(self.request, places=((number, token),)))
        return row


def compute_baseline(session: Session, prompts: Sequence[Ids], steps: int, stops: Ids, context: int) -> Baseline:
    """Let the trainer answer.

    Args:
        context: how many tokens the model reads; an answer ends there, and to a prompt as long as that there is none.
    """
    rooms = tuple(max(0, min(steps, context - len(prompt))) for prompt in prompts)
    request = InferenceRequest(tuple(prompts), rooms, stops)
    answers = answers_of(session, request)
    # Each token of an answer was chosen at a place; so was its end, unless the length limit came first.
    places = [
        (number, token)
        for number, (ids, room) in enumerate(zip(answers, rooms, strict=True))
        for token in range(min(len(ids) + 1, room))
    ]
    stride = -(-len(places) // MOST_PLACES) or 1
    return Baseline(session, replace(request, baseline=answers, places=tuple(places[::stride])))
