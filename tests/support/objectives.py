"""Objectives to try every backend with; the last is a preference between rows, which the product does not offer yet."""

from typing import Any, ClassVar

import numpy as np

from finetune.objectives.cross_entropy import CROSS_ENTROPY, CrossEntropy
from finetune.ports import Objective
from finetune.records import Batch


class Preference:
    """Each even row is to be likelier than the one after it, by the loss of DPO with a reference that knows neither."""

    label_smoothing: ClassVar[float] = 0.0
    summed: ClassVar[bool] = False
    strength = 0.1

    def units(self, batch: Batch) -> int:
        """The pairs."""
        return len(batch.rows) // 2

    def total(self, batch: Batch, losses: Any) -> tuple[float, Any]:
        """-log sigmoid(strength x (the other's loss - its own)) of each pair; a last row without another is nothing."""
        assert len(losses) == batch.target_count
        parts = np.split(losses, np.cumsum([row.target_count for row in batch.rows])[:-1])
        total, slopes = 0.0, [np.zeros_like(part) for part in parts]
        for better in range(0, len(parts) - 1, 2):
            gap = self.strength * (parts[better].sum() - parts[better + 1].sum())
            total += float(np.logaddexp(0.0, gap))
            slopes[better] += self.strength / (1 + np.exp(-gap))
            slopes[better + 1] -= self.strength / (1 + np.exp(-gap))
        return total, np.concatenate(slopes)


OBJECTIVES: tuple[Objective, ...] = (CROSS_ENTROPY, CrossEntropy(0.3), Preference())
