"""Rows to evaluate, prompts to answer, and configs to read."""

from typing import Annotated, Any, Literal

from hypothesis import strategies as st
from pydantic import Field

from finetune_strategies.cases.learned import MODELS, QUICK, WIDE
from finetune_strategies.cases.rows import TEXTS, TINY, Pair, Rows, rows_of
from finetune_strategies.recipes import ModelRecipe, Recipe


class Looked(Rows):
    """Rows to look at, so many at once."""

    batch_size: Annotated[int, Field(ge=1, le=5)]
    model: ModelRecipe = TINY


LOOKED = st.builds(Looked, rows=rows_of(2, 5), batch_size=st.sampled_from([2, 3, 1, 5]), model=MODELS)
EVALUATE_AS_TRAINED = st.builds(Looked, rows=rows_of(1, 2), batch_size=st.just(2), model=MODELS)


class OnFile(Rows):
    """Rows to train on, and rows that are held out."""

    others: Annotated[tuple[Pair, ...], Field(min_length=2, strict=False)]

    @property
    def held(self) -> list[dict[str, str]]:
        """The rows that are held out as data files have them."""
        return [row.model_dump() for row in self.others]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run."""
        return {**QUICK, "training.batch_size": 2}


_NAMES = ("apple", "brook", "cloud", "delta", "ember", "flint", "grove", "haven")
_TAUGHT = tuple(Pair(prompt=f"Where is {name}?", completion=f"In {name}ton.") for name in _NAMES[:4])
# Of unequal lengths, so that the mean of the rows is not that of their tokens, and like none that is trained on.
_HELD = st.lists(st.sampled_from(_NAMES[4:]), min_size=2, max_size=4, unique=True).map(
    lambda names: tuple(
        Pair(
            prompt=f"What does {name} say of {'its long and winding road' if at % 2 else 'it'}?",
            completion=name * (at + 1),
        )
        for at, name in enumerate(names)
    )
)
ON_FILE = st.builds(OnFile, rows=st.just(_TAUGHT), others=_HELD)


class Asked(Recipe):
    """Prompts, and how long an answer may be."""

    prompts: Annotated[tuple[tuple[int, ...], ...], Field(min_length=1, max_length=3, strict=False)]
    most: Annotated[int, Field(ge=1, le=9)] = 5
    model: ModelRecipe = TINY


ASKED = st.builds(
    Asked,
    prompts=st.lists(st.lists(st.integers(6, 255), min_size=1, max_size=9).map(tuple), min_size=1, max_size=3).map(
        tuple
    ),
    most=st.integers(1, 6),
    model=st.sampled_from([WIDE, TINY]),
)


class Full(Recipe):
    """A prompt, and how many tokens the model reads."""

    length: Annotated[int, Field(ge=4, le=12)]
    context: Annotated[int, Field(ge=8, le=12)]


GENERATE_FITS = st.builds(Full, length=st.sampled_from([9, 5]), context=st.sampled_from([10, 12]))


class Spelling(Recipe):
    """The base of a model's rotary positions, and where its `config.json` has it.

    `rope_parameters` is where transformers writes it since 5.0, and `rope_theta` where it was before.
    """

    theta: Annotated[float, Field(gt=1)]
    key: Literal["rope_theta", "rope_parameters"]


SPELLINGS = st.builds(
    Spelling, theta=st.sampled_from([10.0, 500_000.0]), key=st.sampled_from(["rope_theta", "rope_parameters"])
)


class Overlong(Rows):
    """Held-out rows, what is done with those that are too long, and how far below the longest the limit is."""

    policy: Literal["drop", "truncate_prompt"]
    below: Annotated[int, Field(ge=1)]


_SHORT = Pair(prompt="a", completion="b")
_LONGER = st.builds(Pair, prompt=TEXTS.map(lambda text: f"longer than that: {text}"), completion=TEXTS)
EVALUATE_LIMIT = st.builds(
    Overlong,
    rows=_LONGER.map(lambda row: (_SHORT, row)),
    policy=st.sampled_from(["drop", "truncate_prompt"]),
    below=st.integers(1, 9),
)


class Crowd(Recipe):
    """Prompts of one length, asked over and over: so many questions in all."""

    prompts: Annotated[tuple[tuple[int, int, int], ...], Field(min_length=2, max_length=5, strict=False)]
    count: Annotated[int, Field(ge=1, le=300)]

    @property
    def questions(self) -> list[list[int]]:
        """The questions in their order."""
        return [list(self.prompts[number % len(self.prompts)]) for number in range(self.count)]


_THREE = st.tuples(*[st.integers(6, 255)] * 3)
GENERATE_MANY = st.builds(
    Crowd,
    prompts=st.lists(_THREE, min_size=3, max_size=5, unique=True).map(tuple),
    count=st.sampled_from([130, 67, 33]),
)
