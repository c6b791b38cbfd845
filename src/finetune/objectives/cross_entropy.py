"""Supervised fine-tuning: what a trained token costs, each counted once."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from finetune.records import Batch


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """The sum of the tokens' losses, divided in a step by the number of tokens; implements `ports.Objective`.

    `label_smoothing` is what transformers calls `label_smoothing_factor`.
    """

    label_smoothing: float = 0.0
    summed: ClassVar[bool] = True

    def units(self, batch: Batch) -> int:
        """The trained tokens."""
        return batch.target_count

    def total(self, batch: Batch, losses: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """The sum; every token weighs the same."""
        return float(losses.sum()), np.ones_like(losses)


CROSS_ENTROPY = CrossEntropy()
"""The plain one: what is trained on where nothing else is said, and what held-out losses are measured in."""
