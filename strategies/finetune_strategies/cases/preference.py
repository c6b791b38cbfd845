"""Short runs on pairs of answers."""

from typing import Annotated, Any

from hypothesis import strategies as st
from pydantic import Field

from finetune_strategies.cases.learned import MODELS, QUICK
from finetune_strategies.cases.rows import TEXTS, TINY, Said
from finetune_strategies.recipes import ModelRecipe, Recipe


class Choice(Recipe):
    """A question with two answers, as a row of a data file."""

    prompt: Said
    chosen: Said
    rejected: Said


class Choices(Recipe):
    """Pairs to learn in steps of all of them, so that their order says nothing."""

    rows: Annotated[tuple[Choice, ...], Field(min_length=1, max_length=4, strict=False)]
    beta: Annotated[float, Field(gt=0)] = 0.1
    batch_size: Annotated[int, Field(ge=1, le=4)] = 1
    model: ModelRecipe = TINY

    @property
    def values(self) -> list[dict[str, str]]:
        """The rows as data files have them."""
        return [row.model_dump() for row in self.rows]

    @property
    def answers(self) -> list[dict[str, str]]:
        """The rejected answers alone, as rows to learn."""
        return [{"prompt": row.prompt, "completion": row.rejected} for row in self.rows]

    @property
    def settings(self) -> dict[str, Any]:
        """A step holds all pairs."""
        steps = -(-len(self.rows) // self.batch_size)
        more = {"training.batch_size": self.batch_size, "training.gradient_accumulation_steps": steps}
        return {**QUICK, **more, "training.dpo_beta": self.beta, "training.epochs": 3.0}


_CHOICES = st.builds(Choice, prompt=TEXTS, chosen=TEXTS, rejected=TEXTS).filter(lambda row: row.chosen != row.rejected)


def _choices(most: int) -> st.SearchStrategy[Choices]:
    return st.builds(
        Choices,
        rows=st.lists(_CHOICES, min_size=1, max_size=most, unique=True).map(tuple),
        beta=st.sampled_from([0.1, 0.5]),
        batch_size=st.sampled_from([2, 1, 3]),
        model=MODELS,
    )


DPO_ORACLE = _choices(3)
DPO_REFERENCE = _choices(2)
