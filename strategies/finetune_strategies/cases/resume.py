"""Runs that are stopped, and checkpoints that are damaged."""

from typing import Annotated, Any, Literal

from hypothesis import strategies as st
from pydantic import Field

from finetune.adapters.kinds import ADAPTER_KINDS
from finetune.records import DEFAULT_KIND
from finetune_strategies.cases.learned import KINDS, QUICK, Learned, kind_settings
from finetune_strategies.cases.rows import PLAIN, TINY, Pair, Rows, one_of, rows_of

RUN: dict[str, Any] = {
    **QUICK,
    "training.batch_size": 1,
    "training.gradient_accumulation_steps": 2,
    "training.epochs": 3.0,
    "training.save_every": 1,
    "training.schedule": "linear",
    "training.warmup_fraction": 0.34,
    "adapter.dropout": 0.2,
    "training.learning_rate": 5e-3,
}


class Stopped(Rows):
    """A run, and the steps after which it is ended.

    With a schedule it is one of three steps and plain settings, which any trainer has that can go on at all.
    """

    stops: Annotated[tuple[int, ...], Field(min_length=1, max_length=2, strict=False)]
    schedule: Literal["constant", "linear"] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    kind: Annotated[str, Field(pattern=one_of(KINDS))] = DEFAULT_KIND

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run."""
        if self.schedule is None:
            return kind_settings(self.kind, RUN)
        return {
            **PLAIN,
            "training.batch_size": 1,
            "training.max_steps": 3,
            "training.learning_rate": 0.01,
            "training.schedule": self.schedule,
            "training.seed": self.seed,
            "training.save_every": 1,
        }


_STOPS = st.sampled_from([(3, 5), (1, 6), (4, 6), (2, 3)])
_FIVE = st.just(tuple(Pair(prompt="q" * (1 + number), completion=f"{number} of five") for number in range(5)))

STOPPED = st.builds(
    Stopped,
    rows=rows_of(1, 2),
    stops=st.just((1,)),
    schedule=st.sampled_from(["constant", "linear"]),
    seed=st.integers(0, 2),
) | st.builds(Stopped, rows=_FIVE, stops=_STOPS, kind=st.sampled_from(list(ADAPTER_KINDS)))


class Damaged(Rows):
    """A run that is stopped at a step, and a place among its checkpoint's numbers, in thousandths."""

    place: Annotated[int, Field(ge=0, le=999)]


RESUME_DAMAGED = st.builds(Damaged, rows=rows_of(2, 2), place=st.integers(0, 999))

BEST: dict[str, Any] = {
    **QUICK,
    "training.epochs": 4.0,
    "training.save_every": 1,
    "training.evaluate_every": 1,
    "training.load_best_model": True,
    "training.learning_rate": 5e-3,
    "training.batch_size": 2,
    "data.valid_fraction": 0.4,
}


class Logged(Rows):
    """A run that is stopped at a step, and which of the losses that it wrote down are changed."""

    places: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=4, strict=False)]


RESUME_LOG = st.builds(
    Logged, rows=rows_of(4, 4), places=st.lists(st.integers(0, 7), min_size=2, max_size=4, unique=True).map(tuple)
)


class Onward(Learned):
    """An adapter that learned some rows, and other rows to train it on."""

    others: Annotated[tuple[Pair, ...], Field(min_length=1, strict=False)]

    @property
    def more(self) -> list[dict[str, str]]:
        """The other rows as data files have them."""
        return [row.model_dump() for row in self.others]

    @property
    def onward(self) -> dict[str, Any]:
        """The settings of the second run: all rows in one step, and nothing of the adapter."""
        settings = {key: value for key, value in self.settings.items() if not key.startswith("adapter.")}
        return {**settings, "training.batch_size": len(self.others), "training.epochs": 1.0}


ONWARD = st.builds(
    Onward, rows=rows_of(2, 2), kind=st.sampled_from(tuple(KINDS)), others=rows_of(2, 2), model=st.just(TINY)
)


class Longer(Rows):
    """A run of so many epochs, and how many more it is given when they are done."""

    epochs: Annotated[float, Field(gt=0)]
    more: Annotated[float, Field(gt=0)]
    schedule: Literal["constant", "linear", "cosine"]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run, but for its length."""
        return {
            **PLAIN,
            "adapter.dropout": 0.2,
            "training.batch_size": 1,
            "training.learning_rate": 0.01,
            "training.schedule": self.schedule,
            "training.warmup_fraction": 0.0,
            "training.save_every": 2,
        }


LONGER = st.builds(
    Longer,
    rows=_FIVE,
    epochs=st.sampled_from((1.0, 2.0, 0.4)),
    more=st.sampled_from((1.0, 0.6, 2.0)),
    schedule=st.sampled_from(("constant", "linear", "cosine")),
)
