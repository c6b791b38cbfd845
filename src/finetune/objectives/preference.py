"""Direct preference optimisation (DPO): of two answers to one prompt, the chosen one is to gain on the rejected one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from finetune.objectives.row_sums import row_sums
from finetune.ports import Session
from finetune.records import Batch, TokenizedRow


@dataclass(frozen=True, slots=True)
class Preference:
    """-log sigmoid(beta x margin) of each pair (Rafailov et al. 2023, arXiv:2305.18290); implements `ports.Objective`.

    The margin is by how many nats log p of the chosen row has gained on that of the rejected one since step 0. In a
    batch the two rows of a pair follow each other.

    `reference`: -log p of each row at step 0, in nats. `flipped`: the share of pairs that are taken to be the wrong way
    round (Mitchell 2023, conservative DPO), which TRL calls `label_smoothing`.
    """

    beta: float
    reference: Mapping[TokenizedRow, float]
    flipped: float = 0.0
    label_smoothing: ClassVar[float] = 0.0
    summed: ClassVar[bool] = False

    def units(self, batch: Batch) -> int:
        """The pairs."""
        return len(batch.rows) // 2

    def total(self, batch: Batch, losses: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """The sum over pairs; a row that stands alone at the end, as where a process has no share, counts nothing."""
        parts = np.split(losses, np.cumsum([row.target_count for row in batch.rows])[:-1])
        total, slopes = 0.0, [np.zeros_like(part) for part in parts]
        for at in range(0, len(parts) - 1, 2):
            sums = np.array([part.sum() for part in parts[at : at + 2]])
            scaled = self.beta * self.margin(batch.rows[at], batch.rows[at + 1], sums)
            right, wrong = np.logaddexp(0.0, -scaled), np.logaddexp(0.0, scaled)
            total += float((1 - self.flipped) * right + self.flipped * wrong)
            slope = self.beta * (1 - self.flipped - np.exp(-right))
            slopes[at] += slope
            slopes[at + 1] -= slope
        return total, np.concatenate(slopes)

    def margin(self, chosen: TokenizedRow, rejected: TokenizedRow, sums: NDArray[np.float64]) -> float:
        """By how many nats the chosen row has gained on the rejected one; `sums` are their -log p now."""
        return float(self.reference[chosen] - sums[0] - (self.reference[rejected] - sums[1]))


def reference_of(session: Session, pairs: Iterable[TokenizedRow]) -> dict[TokenizedRow, float]:
    """-log p of both sides of each pair, in nats, by the session as it stands."""
    rows = list(dict.fromkeys(side for pair in pairs for side in (pair, pair.rejected) if side is not None))
    return dict(zip(rows, row_sums(session, rows).tolist(), strict=True))
