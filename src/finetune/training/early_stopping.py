"""When training has gone on for long enough, and which of its steps was the best: a rule over held-out losses."""

import math
from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, slots=True)
class Watch:
    """What the looks at the held-out loss have shown so far.

    The best step is the one with the lowest loss, the earlier of two with the same. An improvement is a loss that is
    lower than that of the last improvement by more than `margin` nats per token; the first look is one. After
    `stop_after` looks without any, training stops; None never stops it. A loss that is no number is never the best.
    """

    stop_after: int | None = None
    margin: float = 0.0
    best_step: int = 0
    best_loss: float = math.inf
    idle: int = 0
    _mark: float = math.inf

    def look(self, step: int, loss: float) -> Self:
        """The watch after one more look."""
        improved = loss < self._mark - self.margin
        best_step, best_loss = (step, loss) if loss < self.best_loss else (self.best_step, self.best_loss)
        mark = loss if improved else self._mark
        idle = 0 if improved else self.idle + 1
        return replace(self, best_step=best_step, best_loss=best_loss, idle=idle, _mark=mark)

    @property
    def stops(self) -> bool:
        """Whether it is time to stop."""
        return self.stop_after is not None and self.idle >= self.stop_after
