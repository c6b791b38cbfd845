"""The one protocol by which the suite sees a trainer: who answers, what it can, and how asking can fail."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from finetune.verify.subjects.serving import RefusesError, UnsupportedError, answer_to

__all__ = ["About", "InProcessSubject", "RefusesError", "Subject", "SubjectError", "UnsupportedError"]


class SubjectError(Exception):
    """The trainer hung, crashed or sent a malformed reply: reported as an error, not as a failed law."""


@dataclass(frozen=True, slots=True)
class About:
    """Who answers: its name, the versions of what computes, and each ability with "" or why it is missing."""

    name: str
    versions: Mapping[str, str]
    abilities: Mapping[str, str]

    def lacks(self, needed: Sequence[str]) -> str:
        """What of this is missing, and why; empty where nothing is."""
        unknown = "it has no such ability"
        reasons = {ability: self.abilities.get(ability, unknown) for ability in needed}
        return "; ".join(f"{ability}: {why}" for ability, why in reasons.items() if why)


class Subject(Protocol):
    """A trainer, ours or anybody's, reached in this process, as a subprocess or through a command."""

    about: About

    def ask(self, ability: str, given: Mapping[str, object]) -> Mapping[str, Any]:
        """The answer to one question.

        Raises:
            RefusesError: the trainer refuses, in its own words.
            UnsupportedError: it has nothing of the kind.
            SubjectError: it hung, ended, or answered with what is no answer.
        """
        ...

    def close(self) -> None:
        """Leave nothing running."""
        ...


class InProcessSubject:
    """A trainer in this process, which is quick.

    Args:
        handlers: a function of keyword arguments for each ability.
        refusals: exceptions of the trainer's that mean it refuses.
        end: ends what the handlers have started.
    """

    def __init__(
        self,
        about: About,
        handlers: Mapping[str, Callable[..., Any]],
        refusals: Sequence[type[Exception]],
        end: Callable[[], None] = lambda: None,
    ) -> None:
        self.about = about
        self._handlers = handlers
        self._refusals = tuple(refusals)
        self._end = end

    def ask(self, ability: str, given: Mapping[str, object]) -> Mapping[str, Any]:
        """The answer to one question."""
        return unwrapped(answer_to(self._handlers, ability, given, self._refusals), ability)

    def close(self) -> None:
        """Leave nothing running."""
        self._end()


def unwrapped(reply: object, ability: str) -> Mapping[str, Any]:
    """What a reply holds.

    Raises:
        RefusesError, UnsupportedError, SubjectError: as `Subject.ask`.
    """
    if not isinstance(reply, dict) or len(reply) != 1:
        raise SubjectError(f"asked to {ability} it replied with what is no reply: {str(reply)[:300]!r}")
    [(kind, content)] = reply.items()
    if kind == "answer" and isinstance(content, dict):
        return content
    if kind == "refused":
        raise RefusesError(str(content))
    if kind == "unsupported":
        raise UnsupportedError(str(content))
    if kind == "error":
        raise SubjectError(f"asked to {ability} it failed:\n{str(content)[-2000:]}")
    raise SubjectError(f"asked to {ability} it replied with what is no reply: {str(reply)[:300]!r}")
