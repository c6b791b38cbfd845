"""Early stopping: a rule over held-out losses that ends training and knows its best step."""

import math
from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """What the held-out losses have shown so far.

    The best step is the one with the lowest loss, the earlier of two with the same. An improvement is a loss that is
    lower than that of the last improvement by more than `min_delta` nats per token; the first evaluation is one. After
    `patience` evaluations without any, training stops; None never stops it. NaN is never the best.
    """

    patience: int | None = None
    min_delta: float = 0.0
    best_step: int = 0
    best_loss: float = math.inf
    patience_used: int = 0
    _last_improvement: float = math.inf

    def update(self, step: int, loss: float) -> Self:
        """The state after one more evaluation."""
        improved = loss < self._last_improvement - self.min_delta
        best_step, best_loss = (step, loss) if loss < self.best_loss else (self.best_step, self.best_loss)
        return replace(
            self,
            best_step=best_step,
            best_loss=best_loss,
            patience_used=0 if improved else self.patience_used + 1,
            _last_improvement=loss if improved else self._last_improvement,
        )

    @property
    def stops(self) -> bool:
        """Whether training stops now."""
        return self.patience is not None and self.patience_used >= self.patience


@dataclass(frozen=True, slots=True)
class Trained:
    """How training ended: the steps that were planned and taken, the step whose weights are kept, and the best one."""

    planned: int
    taken: int
    kept: int
    stopping: EarlyStopping

    @property
    def stopped_early(self) -> bool:
        """Whether the held-out loss ended training before its last step."""
        return self.taken < self.planned

    def notes(self, *, load_best_model: bool) -> list[str]:
        """Why training ended where it did, and whose weights were kept; empty where nothing is unusual."""
        notes, stopping = [], self.stopping
        if self.stopped_early:
            notes.append(
                f"training stopped early, at step {self.taken} of {self.planned}: the held-out loss had not improved "
                f"for {stopping.patience_used} looks in a row; it was lowest, {stopping.best_loss:.4f}, at step "
                f"{stopping.best_step}; the learning rate went as planned for all steps"
            )
        if load_best_model:
            notes.append(
                f"the adapter is that of step {self.kept}, which had the lowest held-out loss; a loss that the step "
                "was chosen by flatters it"
            )
        return notes
