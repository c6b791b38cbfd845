"""What a served model says."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer, whether it ended by itself, and how many tokens its prompt had; None where that is not told."""

    text: str
    ended: bool
    prompt_tokens: int | None
