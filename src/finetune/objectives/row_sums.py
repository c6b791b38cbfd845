"""What a session makes of each row by itself, asked through the socket that objectives have."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from finetune.ports import Session
from finetune.records import Batch, TokenizedRow

_BATCH_TOKENS = 4096


class EachTarget:
    """An objective that only listens: it keeps the loss of every target of a batch."""

    label_smoothing: ClassVar[float] = 0.0
    summed: ClassVar[bool] = False

    def __init__(self) -> None:
        self.losses: NDArray[np.float64] = np.empty(0)

    def units(self, batch: Batch) -> int:
        """The trained tokens."""
        return batch.target_count

    def total(self, batch: Batch, losses: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """The sum, once heard."""
        self.losses = losses
        return float(losses.sum()), np.ones_like(losses)


def row_sums(session: Session, rows: Sequence[TokenizedRow]) -> NDArray[np.float64]:
    """-log p of each row's trained tokens together, (rows,) in nats, dropout off; the model is left as it was."""
    sums = np.empty(len(rows))
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    while order:
        longest = len(rows[order[-1]].ids)
        members = order[-max(1, _BATCH_TOKENS // longest) :]
        del order[-len(members) :]
        sums[members] = batch_sums(session, Batch(tuple(rows[index] for index in members)))
    return sums


def batch_sums(session: Session, batch: Batch) -> list[float]:
    """The same of the rows of one batch, which go through the model together."""
    listener = EachTarget()
    session.loss(batch, listener)
    ends = np.cumsum([row.target_count for row in batch.rows])
    return [float(each.sum()) for each in np.split(listener.losses, ends[:-1])]
