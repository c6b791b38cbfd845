"""A session small enough to check by hand: one number is trained to guess the mean of the trained token ids."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from finetune.records import Batch


@dataclass
class LogitsOnly:
    """Two logits after each token, whose log probabilities rounding moves by so many nats."""

    rounding: float = 1e-6

    def save_logits(self, prompts: Sequence[Sequence[int]], path: Path) -> None:
        """Both words are as likely as each other but for rounding."""
        rows = {str(n): np.tile(np.float32([0, 1e-1]), (len(ids), 1)) for n, ids in enumerate(prompts)}
        save_file(rows, path)

    def logits_in_other_precision(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The same, not rounded."""
        return [np.tile(np.float32([0, 1e-1 + 2 * self.rounding]), (len(ids), 1)) for ids in prompts]


@dataclass
class ToySession:
    """The loss of a token is half the squared distance from `value` to its id; every call is written down.

    `poison` maps the number of a call to what it gives back instead of the truth, for one kind of call.
    """

    value: float = 0.0
    gradient: float = 0.0
    calls: list[tuple[str, Any]] = field(default_factory=list)
    poison: dict[tuple[str, int], float] = field(default_factory=dict)

    def accumulate(self, batch: Batch, weight: float, *objective: Any) -> float:
        """Add the gradient by hand."""
        targets = targets_of(batch)
        self.gradient += weight * sum(self.value - target for target in targets)
        return self._noted("accumulate", (batch, weight), self._summed(batch))

    def gradient_norms(self) -> dict[str, float]:
        """The one gradient there is."""
        return {"value": self._noted("gradient_norms", None, abs(self.gradient))}

    def clip_gradients(self) -> float:
        """Nothing is clipped; the norm is told."""
        return self._noted("clip_gradients", None, abs(self.gradient))

    def update(self, learning_rate: float) -> None:
        """One step of plain gradient descent."""
        self._noted("update", learning_rate, 0.0)
        self.value -= learning_rate * self.gradient
        self.gradient = 0.0

    def loss(self, batch: Batch, *objective: Any) -> float:
        """The summed loss."""
        return self._noted("loss", batch, self._summed(batch))

    def called(self, name: str) -> list[Any]:
        """What each call of this name was given."""
        return [given for called, given in self.calls if called == name]

    def _summed(self, batch: Batch) -> float:
        return sum((self.value - target) ** 2 / 2 for target in targets_of(batch))

    def _noted(self, name: str, given: Any, truth: float) -> float:
        number = sum(called == name for called, _ in self.calls)
        self.calls.append((name, given))
        return self.poison.get((name, number), truth)


def targets_of(batch: Batch) -> list[int]:
    """The ids that carry loss, counted afresh: trained, and not the first of their row."""
    return [
        token
        for row in batch.rows
        for place, (token, trained) in enumerate(zip(row.ids, row.trained, strict=True))
        if trained and place > 0
    ]
