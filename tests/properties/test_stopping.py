"""Laws of stopping early and of the best step: a rule over held-out losses, next to a plain reading of its words."""

import math

from hypothesis import example, given
from hypothesis import strategies as st

from finetune.training.early_stopping import EarlyStopping

LOSSES = st.lists(st.sampled_from([0.5, 1.0, 1.5, math.nan, math.inf]) | st.floats(0, 4), min_size=1, max_size=12)


def watched(losses: list[float], stop_after: int | None, margin: float = 0.0) -> tuple[EarlyStopping, int | None]:
    """The watch after all looks, at steps 10, 20, ...; and the step at which it first said to stop."""
    watch, stopped = EarlyStopping(stop_after, margin), None
    for number, loss in enumerate(losses, start=1):
        watch = watch.update(10 * number, loss)
        stopped = 10 * number if stopped is None and watch.stops else stopped
    return watch, stopped


def lowest(losses: list[float]) -> int:
    """The place of the lowest loss, counted from 1, the earlier of equal ones; 0 where none is a finite number."""
    good = [(loss, number) for number, loss in enumerate(losses, start=1) if math.isfinite(loss)]
    return min(good)[1] if good else 0


@given(LOSSES, st.integers(1, 4))
@example([math.nan, 1.0, 1.0, 1.0], 2)
@example([math.inf, math.inf], 2)
@example([1.0, 2.0, 0.5, 2.0, 0.5], 2)
def test_stopping_comes_when_the_best_look_is_so_many_looks_ago(losses: list[float], stop_after: int) -> None:
    """It is time to stop at the first look whose distance from the lowest before it, the earlier of two, is reached."""
    due = [number for number in range(1, len(losses) + 1) if number - lowest(losses[:number]) >= stop_after]
    watch, stopped = watched(losses, stop_after)
    assert stopped == (10 * due[0] if due else None)
    assert watch.best_step == 10 * lowest(losses)
    assert watch.best_loss == (losses[lowest(losses) - 1] if lowest(losses) else math.inf)


@given(LOSSES)
def test_stopping_never_comes_unless_it_is_asked_for(losses: list[float]) -> None:
    """Without `stop_after` nothing stops, and the best step is found all the same."""
    watch, stopped = watched(losses, None)
    assert stopped is None
    assert watch.best_step == 10 * lowest(losses)


@given(LOSSES, st.integers(1, 4), st.sampled_from([0.1, 0.5, 1.0]))
@example([2.0, 1.9, 1.8, 1.7, 1.6, 1.5], 3, 0.5)
def test_stopping_margin_counts_from_the_last_improvement(losses: list[float], stop_after: int, margin: float) -> None:
    """With a margin only a fall of more than it, from the last improvement on, is one; the best step ignores it."""
    improvements: list[float] = []
    idle, due = 0, None
    for number, loss in enumerate(losses, start=1):
        if math.isfinite(loss) and all(loss < earlier - margin for earlier in improvements):
            improvements.append(loss)
            idle = 0
        else:
            idle += 1
        due = 10 * number if due is None and idle >= stop_after else due
    watch, stopped = watched(losses, stop_after, margin)
    assert stopped == due
    assert watch.best_step == 10 * lowest(losses)
