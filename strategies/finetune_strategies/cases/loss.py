"""Batches of token rows, and first steps."""

from typing import Annotated, Any

from hypothesis import strategies as st
from pydantic import Field

from finetune_strategies.cases.learned import KINDS, MODELS
from finetune_strategies.cases.rows import PAIRS, TINY, IdRow, Rows, one_of, rows_of, token_rows
from finetune_strategies.recipes import FEWEST_WORDS, ModelRecipe, Recipe


class Batches(Recipe):
    """Batches of token rows that make one optimizer step, and the model."""

    micro: Annotated[tuple[tuple[IdRow, ...], ...], Field(min_length=1, max_length=3, strict=False)]
    model: ModelRecipe = TINY

    @property
    def values(self) -> list[list[dict[str, Any]]]:
        """The batches as a question has them."""
        return [[row.value for row in batch] for batch in self.micro]


def _batches(least: int, most: int, largest: int) -> st.SearchStrategy[Batches]:
    batch = st.lists(token_rows(12), min_size=1, max_size=largest).map(tuple)
    return st.builds(Batches, micro=st.lists(batch, min_size=least, max_size=most).map(tuple), model=MODELS)


@st.composite
def _any_batch(draw: st.DrawFn) -> Batches:
    """Rows of any tokens, those for padding and for ends among them."""
    tokens = st.one_of(st.integers(0, 3), st.integers(0, FEWEST_WORDS - 1))
    drawn = draw(st.lists(st.lists(tokens, min_size=2, max_size=12), min_size=1, max_size=3))
    rows = [IdRow(ids=tuple(each), answer=draw(st.integers(1, len(each) - 1))) for each in drawn]
    return Batches(micro=(tuple(rows),))


LOSS_ORACLE = _batches(1, 1, 3) | _any_batch()


class FirstStep(Recipe):
    """A token row to take the first step on, with an adapter of a kind."""

    row: IdRow
    kind: Annotated[str, Field(pattern=one_of(KINDS))]


GRADIENT_FIRST = st.builds(
    FirstStep, row=st.just(IdRow(ids=(20, 30, 40, 50, 60), answer=2)), kind=st.sampled_from(list(KINDS))
)

GRADIENT_ORACLE = _batches(1, 3, 2)
LOSS_NAN_TOLD = st.builds(Rows, rows=rows_of(1, 1))


class DroppedRow(Recipe):
    """A row that dropout is tried on."""

    row: IdRow


DROPOUT_FRESH = st.builds(DroppedRow, row=token_rows(12))


class Recomputed(Batches):
    """Batches of one step, and the share that dropout takes."""

    dropout: Annotated[float, Field(ge=0, lt=1)]


GRADIENT_RECOMPUTED = st.builds(
    Recomputed,
    micro=st.lists(st.tuples(token_rows(12)), min_size=1, max_size=2).map(tuple),
    model=MODELS,
    dropout=st.sampled_from([0.5, 0.0]),
)
DROPOUT_ACTS = st.builds(Rows, rows=st.lists(PAIRS, min_size=2, max_size=2, unique=True).map(tuple))


class Spared(FirstStep):
    """A token row to take the first step on, with an adapter of a kind, and the share that dropout takes."""

    dropout: Annotated[float, Field(gt=0, lt=1)]


DROPOUT_SPARES = st.builds(
    Spared, row=token_rows(12), kind=st.sampled_from(["lora", "dora"]), dropout=st.sampled_from([0.5, 0.1])
)


class Smoothed(Batches):
    """Batches of one step, and the share of each target that goes to all words."""

    smoothing: Annotated[float, Field(gt=0, lt=1)]


GRADIENT_SMOOTHED = st.builds(
    Smoothed,
    micro=st.lists(st.lists(token_rows(12), min_size=1, max_size=2).map(tuple), min_size=2, max_size=3).map(tuple),
    model=MODELS,
    smoothing=st.sampled_from([0.1, 0.4]),
)
