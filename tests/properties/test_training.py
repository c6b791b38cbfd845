"""Laws of the training loop: every row once an epoch, one rate a step, tokens weighted alike, when to stop."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.data.batches import epoch_batches, fixed_batches
from finetune.errors import NonFiniteError, TrainingError
from finetune.events import Event, FirstGradients, HeldOutLoss, StepDone
from finetune.evidence.packing_check import check_packing
from finetune.records import Batch, TokenizedRow
from finetune.training.early_stopping import EarlyStopping
from finetune.training.loop import LoopPlan, mean_loss, train
from finetune.training.schedule import Schedule, learning_rate_at
from finetune_strategies.datasets import token_rows
from support.tiny_llamas import ROWS, adapted
from support.toy_session import LogitsOnly, ToySession, targets_of

SCHEDULES = get_args(Schedule)
NOT_FINITE = (math.nan, math.inf, -math.inf)


def closed_form(step: int, total: int, peak: float, warmup: int, schedule: str) -> float:
    """The rate, as geometry: a line up to the peak, then a line or half a cosine down to zero after the end."""
    top = max(warmup, 1)
    if step <= top:
        return peak * step / top
    left = (total + 1 - step) / (total + 1 - top)
    return {"constant": peak, "linear": peak * left, "cosine": peak * math.sin(math.pi / 2 * left) ** 2}[schedule]


@st.composite
def lengths(draw: st.DrawFn) -> tuple[int, int]:
    """Total steps, and warm-up steps up to as many."""
    total = draw(st.sampled_from([1, 2, 3, 7, 64, 1000]) | st.integers(1, 300))
    return total, draw(st.sampled_from([0, 1, total - 1, total]) | st.integers(0, total))


@given(lengths(), st.sampled_from(SCHEDULES), st.sampled_from([2e-5, 1.0, 3e-3]))
@example((1, 0), "cosine", 1.0)
@example((1, 1), "linear", 1.0)
def test_schedule_is_its_closed_form_and_never_zero(steps: tuple[int, int], schedule: Schedule, peak: float) -> None:
    """The rate of every step is that of the closed form, above zero and at most the peak."""
    total, warmup = steps
    for step in range(1, total + 1):
        rate = learning_rate_at(step, total, learning_rate=peak, warmup_steps=warmup, schedule=schedule)
        assert rate == pytest.approx(closed_form(step, total, peak, warmup, schedule), rel=1e-9)
        assert 0 < rate <= peak


@given(lengths(), st.sampled_from(SCHEDULES))
def test_schedule_rises_to_the_peak_then_never_rises(steps: tuple[int, int], schedule: Schedule) -> None:
    """The peak is reached exactly at the end of warm-up (step 1 without), not before, and nothing jumps at the join."""
    total, warmup = steps
    rates = [
        learning_rate_at(step, total, learning_rate=1.0, warmup_steps=warmup, schedule=schedule)
        for step in range(1, total + 1)
    ]
    top = max(warmup, 1)
    assert rates[top - 1] == 1.0
    assert all(low < high for low, high in itertools.pairwise(rates[:top]))
    down = [high - low for high, low in itertools.pairwise(rates[top - 1 :])]
    assert all(drop == 0 if schedule == "constant" else drop > 0 for drop in down)
    if schedule != "constant":
        assert max(down, default=0) <= math.pi / 2 / (total + 1 - top) + 1e-12


@dataclasses.dataclass(frozen=True)
class Setup:
    """Rows and how they are trained on."""

    rows: tuple[TokenizedRow, ...]
    batch_size: int
    accumulation: int
    epochs: int
    seed: int

    @property
    def per_epoch(self) -> int:
        """Optimizer steps an epoch takes, by counting."""
        batches = [None] * len(range(0, len(self.rows), self.batch_size))
        return len(range(0, len(batches), self.accumulation))

    def plan(self, **changes: Any) -> LoopPlan:
        """The plan of whole epochs, unless changed."""
        whole = LoopPlan(self.per_epoch * self.epochs, self.accumulation, 0.1, 2, "linear", 1000)
        return dataclasses.replace(whole, **changes)

    def batches(self, epoch: int) -> list[Batch]:
        """The batches of one epoch."""
        return epoch_batches(self.rows, self.batch_size, seed=self.seed, epoch=epoch)

    def events(self, session: ToySession, held_out: Sequence[Batch] = (), **changes: Any) -> Iterator[Event]:
        """Train step by step."""
        done = changes.pop("done", 0)
        return train(session, self.batches, held_out, self.plan(**changes), done_steps=done)  # type: ignore[arg-type]

    def run(self, session: ToySession, held_out: Sequence[Batch] = (), **changes: Any) -> list[Event]:
        """Train to the end, and return all that was told."""
        return list(self.events(session, held_out, **changes))


def setups() -> st.SearchStrategy[Setup]:
    """Small runs; the row count seldom fits batch size and accumulation."""
    return st.builds(Setup, token_rows(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))


def training_events(events: Sequence[Event]) -> list[StepDone]:
    """The steps among the events."""
    return [event for event in events if isinstance(event, StepDone)]


def windows_of(session: ToySession) -> list[list[tuple[Batch, float]]]:
    """What was accumulated for each update; the tail that no update followed comes last."""
    windows: list[list[tuple[Batch, float]]] = [[]]
    for name, given_ in session.calls:
        if name == "accumulate":
            windows[-1].append(given_)
        elif name == "update":
            windows.append([])
    return windows


@given(setups())
def test_step_weighs_every_trained_token_alike(setup: Setup) -> None:
    """All batches of a step get one weight, 1 / its trained tokens, and its loss is the mean over those tokens."""
    session, shadow = ToySession(), 0.0
    steps = training_events(setup.run(session))
    for window, step in zip(windows_of(session), steps, strict=False):
        targets = [target for batch, _ in window for target in targets_of(batch)]
        assert {weight for _, weight in window} == {1 / len(targets)}
        assert step.loss == pytest.approx(sum((shadow - target) ** 2 / 2 for target in targets) / len(targets))
        assert step.trained_tokens == len(targets)
        assert step.tokens == sum(len(row.ids) for batch, _ in window for row in batch.rows)
        shadow -= step.learning_rate * (shadow - sum(targets) / len(targets))
    assert session.value == pytest.approx(shadow)


@given(setups(), st.sampled_from(SCHEDULES), st.data())
def test_rate_counts_optimizer_steps(setup: Setup, schedule: Schedule, data: st.DataObject) -> None:
    """The rate of an update is that of the closed form over optimizer steps, and it is the one that is told."""
    total = setup.plan().total_steps
    warmup = data.draw(st.integers(0, total))
    session = ToySession()
    steps = training_events(setup.run(session, schedule=schedule, warmup_steps=warmup))
    expected = [closed_form(step, total, 0.1, warmup, schedule) for step in range(1, total + 1)]
    assert session.called("update") == pytest.approx(expected)
    assert [step.learning_rate for step in steps] == session.called("update")
    assert [(step.step, step.total_steps) for step in steps] == [(step, total) for step in range(1, total + 1)]
    assert [step.step for step in steps if step.epoch == round(step.epoch)] == [
        setup.per_epoch * (epoch + 1) for epoch in range(setup.epochs)
    ]


@given(setups())
def test_step_clips_once_between_gradients_and_update(setup: Setup) -> None:
    """Every step accumulates, then clips once, then updates once; the norm that is told is the one clipping found."""
    session = ToySession()
    steps = training_events(setup.run(session))
    verbs = "".join(
        {"accumulate": "a", "clip_gradients": "c", "update": "u"}.get(name, "") for name, _ in session.calls
    )
    assert all(set(part) <= {"a"} and part for part in verbs.removesuffix("cu").split("cu"))
    assert verbs.count("cu") == len(steps)
    assert all(step.grad_norm >= 0 for step in steps)


@given(setups(), st.sampled_from(NOT_FINITE), st.sampled_from(["accumulate", "clip_gradients"]), st.data())
def test_non_finite_loss_or_gradient_stops_before_the_update(
    setup: Setup, bad: float, where: str, data: st.DataObject
) -> None:
    """A NaN or infinite loss or gradient in any batch stops the run: that step changes no weight and tells nothing."""
    healthy = ToySession()
    setup.run(healthy)
    number = data.draw(st.integers(0, len(healthy.called(where)) - 1))
    session = ToySession(poison={(where, number): bad})
    told: list[Event] = []
    with pytest.raises(NonFiniteError) as caught:
        _collect(setup.events(session), told)
    broken = len(session.called("update")) + 1
    calls = list(itertools.accumulate(len(window) for window in windows_of(healthy)))
    assert broken == number + 1 if where == "clip_gradients" else calls[broken - 1] > number
    assert [step.step for step in training_events(told)] == list(range(1, broken))
    assert f"step {broken}" in str(caught.value)
    assert f"those of step {broken - 1}" in str(caught.value)
    assert windows_of(session)[-1][0][0].rows[0].where in str(caught.value)
    assert caught.value.hint


def _collect(events: Iterator[Event], told: list[Event]) -> None:
    """List the events; an error does not lose those before it."""
    for event in events:
        told.append(event)


@given(setups(), st.sampled_from(NOT_FINITE))
def test_first_gradients_that_are_not_finite_are_never_told(setup: Setup, bad: float) -> None:
    """A gradient that is NaN or infinite at step 1 is an error, not an event: events are JSON, which has no NaN."""
    session = ToySession(poison={("clip_gradients", 0): bad, ("gradient_norms", 0): bad})
    with pytest.raises(NonFiniteError):
        next(setup.events(session))
    assert session.called("update") == []


@given(setups(), st.data())
def test_first_gradients_told_once_before_the_first_update(setup: Setup, data: st.DataObject) -> None:
    """The gradients of step 1, all its batches in, are told once, before any weight changes; never on resume."""
    session = ToySession()
    events = setup.events(session)
    first = next(events)
    assert isinstance(first, FirstGradients)
    assert session.called("update") == []
    assert len(session.called("accumulate")) == min(setup.accumulation, math.ceil(len(setup.rows) / setup.batch_size))
    assert first.norms == {"value": abs(session.gradient)}
    assert not any(isinstance(event, FirstGradients) for event in events)
    done = data.draw(st.integers(1, setup.plan().total_steps))
    assert not any(isinstance(event, FirstGradients) for event in setup.run(ToySession(), done=done))


@given(setups(), token_rows(), st.integers(1, 5), st.integers(1, 3))
def test_held_out_loss_told_when_due_and_at_the_end(
    setup: Setup, rows: tuple[TokenizedRow, ...], every: int, size: int
) -> None:
    """Held-out loss is told when due and at the end, token-weighted, of the weights then, before its step is done."""
    session = ToySession()
    held_out = fixed_batches(rows, size)
    events = setup.run(session, held_out, evaluate_every=every)
    told = [event for event in events if isinstance(event, HeldOutLoss)]
    total = setup.plan().total_steps
    assert [event.step for event in told] == [
        step for step in range(1, total + 1) if step % every == 0 or step == total
    ]
    assert isinstance(events[-1], StepDone)
    targets = [target for batch in held_out for target in targets_of(batch)]
    assert {event.tokens for event in told} == {len(targets)}
    mean = sum((session.value - target) ** 2 / 2 for target in targets) / len(targets)
    assert told[-1].loss == pytest.approx(mean)
    places = [index for index, event in enumerate(events) if isinstance(event, HeldOutLoss)]
    assert all(isinstance(events[place + 1], StepDone) for place in places)
    assert all(events[place + 1].step == events[place].step for place in places)  # type: ignore[union-attr]
    assert not any(isinstance(event, HeldOutLoss) for event in setup.run(ToySession(), evaluate_every=1))


@given(token_rows(), st.sampled_from(NOT_FINITE), st.data())
def test_mean_loss_that_is_not_finite_is_an_error(
    rows: tuple[TokenizedRow, ...], bad: float, data: st.DataObject
) -> None:
    """One batch whose loss is NaN or infinite is never averaged away nor told as a number: it is an error."""
    batches = fixed_batches(rows, 2)
    number = data.draw(st.integers(0, len(batches) - 1))
    with pytest.raises(NonFiniteError, match="row "):
        mean_loss(ToySession(poison={("loss", number): bad}), batches)  # type: ignore[arg-type]


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


PACKED = Batch(ROWS[:4], (4,))


@dataclass
class Leaky(LogitsOnly):
    """A model in which rows that share a sequence change each other's loss by so many nats."""

    leak: float = 0.0

    def loss(self, batch: Batch, *objective: object) -> float:
        """Ten nats a row, and more of them where rows share."""
        return 10.0 * len(batch.rows) + self.leak * bool(batch.packed)


@given(st.sampled_from([1, -1]), st.floats(1.2, 1e6), st.sampled_from([1e-6, 1e-2]))
def test_packing_model_that_mixes_rows_is_refused(sign: int, factor: float, rounding: float) -> None:
    """A loss that packing changes by more than this model's rounding is refused with both losses, NaN too."""
    for dtype, times in (("float32", 16), ("bfloat16", 3)):
        allowed = times * rounding * math.sqrt(PACKED.target_count)
        for leak in (sign * factor * allowed, float("nan")):
            with pytest.raises(TrainingError, match="share a sequence") as caught:
                check_packing(cast(Any, Leaky(rounding, leak)), PACKED, dtype)
            assert "training.packing" in caught.value.hint
        sees = check_packing(cast(Any, Leaky(rounding, sign * allowed / factor)), PACKED, dtype)
        assert sees == pytest.approx(allowed / 40, rel=0.1)


def test_packing_real_model_is_accepted_and_left_as_it_was() -> None:
    """The reference Llama keeps rows apart, and a ten-thousandth of their loss would have shown."""
    session = adapted(trained=True)
    before = session.fingerprints()
    assert check_packing(session, PACKED, "float32") < 1e-4
    assert session.fingerprints() == before
