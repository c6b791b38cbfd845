"""Short runs, their schedules and seeds."""

import math
from typing import Annotated, Any, Literal

from hypothesis import strategies as st
from pydantic import Field

from finetune.adapters.kinds import ADAPTER_KINDS
from finetune_strategies.cases.learned import MODELS, ONE_ROW, Learned
from finetune_strategies.cases.rows import Pair, Rows, Word, rows_of
from finetune_strategies.recipes import Recipe


class Lessons(Recipe):
    """Pairs of words, two at a time to be learned by heart, and how many of these lessons must succeed."""

    words: Annotated[tuple[Word, ...], Field(min_length=4, strict=False)]
    least: Annotated[int, Field(ge=1)]

    @property
    def lessons(self) -> list[list[dict[str, str]]]:
        """The rows of each lesson: every four words in a row, the list taken as a circle."""
        ring = [*self.words, *self.words]
        return [
            [
                {"prompt": f"The word for {ring[at]}?", "completion": ring[at + 2]},
                {"prompt": f"The word for {ring[at + 1]}?", "completion": ring[at + 3]},
            ]
            for at in range(len(self.words))
        ]


_WORDS = ("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "heath")
LEARNING_BY_HEART = st.just(Lessons(words=_WORDS, least=5))


class Whole(Learned):
    """A short run over rows that one step can hold."""

    accumulation: Annotated[int, Field(ge=1, le=4)] = 1
    batch_size: Annotated[int, Field(ge=1, le=4)] = 4
    decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 1e6
    schedule: Annotated[str, Field(pattern="^(constant|linear|cosine)$")] = "constant"
    rate: Annotated[float, Field(gt=0)] = 0.05

    @property
    def settings(self) -> dict[str, Any]:
        """All of them; a step holds all rows, so that their order says nothing."""
        return {
            **super().settings,
            "training.gradient_accumulation_steps": self.accumulation,
            "training.batch_size": self.batch_size,
            "training.weight_decay": self.decay,
            "training.max_grad_norm": self.clip,
            "training.schedule": self.schedule,
            "training.learning_rate": self.rate,
            "training.epochs": 3.0,
        }


COURSES = st.builds(
    Whole,
    rows=rows_of(1, 3),
    model=MODELS,
    kind=st.sampled_from([*ADAPTER_KINDS, "rank-stabilised"]),
    accumulation=st.sampled_from([3, 2, 4, 1]),
    batch_size=st.sampled_from([1, 2, 3]),
    decay=st.sampled_from([0.0, 0.9]),
    clip=st.sampled_from([1e6, 0.01]),
    schedule=st.sampled_from(["constant", "linear"]),
).filter(lambda case: case.accumulation * case.batch_size >= len(case.rows))

TRAIN_TAIL = st.builds(
    Whole,
    rows=st.sampled_from([3, 1]).map(lambda count: (Pair(prompt="ab", completion="cde"),) * count),
    accumulation=st.just(2),
    batch_size=st.just(1),
    rate=st.sampled_from([0.05, 1e-5]),
)


class Seeds(Rows):
    """Rows and two seeds."""

    seed: Annotated[int, Field(ge=0)]
    other: Annotated[int, Field(ge=0)]


SEED_DECIDES = st.builds(Seeds, rows=rows_of(1, 2), seed=st.sampled_from([0, 7]), other=st.sampled_from([1, 3]))
RUNS_UNTOUCHED = st.builds(Rows, rows=rows_of(1, 2))


class Best(Rows):
    """Rows to train on, and one to watch."""

    watched: Pair
    rate: Annotated[float, Field(gt=0)]


KEEP_BEST = st.builds(
    Best,
    rows=ONE_ROW,
    watched=st.builds(Pair, prompt=st.just("q"), completion=st.sampled_from(["zz", "a"])),
    rate=st.just(0.4),
)


class Scheduled(Rows):
    """A run: so many steps an epoch, each of so many batches; a tenth of the steps is one."""

    accumulation: Annotated[int, Field(ge=1, le=4)]
    epochs: Annotated[int, Field(ge=1, le=10)]
    warmup: Annotated[int, Field(ge=0, le=5)]
    schedule: Annotated[str, Field(pattern="^(constant|linear|cosine)$")]

    @property
    def steps(self) -> int:
        """How many optimizer steps there are."""
        return self.epochs * math.ceil(len(self.rows) / self.accumulation)


SCHEDULE_CLOSED_FORM = st.builds(
    Scheduled,
    rows=rows_of(3, 3),
    accumulation=st.sampled_from([3, 2]),
    epochs=st.just(5),
    warmup=st.sampled_from([3, 0, 2]),
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
)


class Moved(Learned):
    """A run, and the format in which its base computes."""

    dtype: Literal["float32", "bfloat16"]

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the kind, the format, and a rate that half precision would lose beside weights of 1."""
        return {**super().settings, "model.dtype": self.dtype, "training.learning_rate": 1e-3}


TRAIN_MOVES = st.builds(
    Moved, rows=ONE_ROW, kind=st.sampled_from(list(ADAPTER_KINDS)), dtype=st.sampled_from(["float32", "bfloat16"])
)


class Watched(Rows):
    """Rows to train on, and one that is looked at on the way or is not."""

    watched: Pair
    looks: bool
    seed: Annotated[int, Field(ge=0)]


TRAIN_UNDISTURBED = st.builds(
    Watched,
    rows=rows_of(2, 2),
    watched=st.just(Pair(prompt="q", completion="zz")),
    looks=st.booleans(),
    seed=st.sampled_from([0, 3]),
)
