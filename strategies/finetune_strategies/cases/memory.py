"""Models and adapters to count, and what makes them larger."""

from collections.abc import Mapping
from typing import Annotated, Any

from hypothesis import strategies as st
from pydantic import Field

from finetune.adapters.kinds import ADAPTER_KINDS
from finetune.records import DEFAULT_KIND
from finetune_strategies.cases.learned import KINDS, MODELS, WIDE, kind_settings
from finetune_strategies.cases.rows import PLAIN, TINY, one_of
from finetune_strategies.recipes import ModelRecipe, Recipe

_TORCH: Mapping[str, Any] = {**PLAIN, "backend": "torch", "tokens.max_length": 64, "training.batch_size": 2}


class Counted(Recipe):
    """A model, an adapter, and the number format of the base."""

    model: ModelRecipe = TINY
    kind: Annotated[str, Field(pattern=one_of(KINDS))] = DEFAULT_KIND
    rank: Annotated[int, Field(ge=1, le=4)] = 2
    dtype: Annotated[str, Field(pattern="^(float32|bfloat16)$")] = "float32"

    @property
    def settings(self) -> dict[str, Any]:
        """What is estimated, as torch would train it."""
        return kind_settings(self.kind, {**_TORCH, "adapter.rank": self.rank, "model.dtype": self.dtype})


COUNTED = st.builds(
    Counted,
    model=st.just(WIDE),
    kind=st.sampled_from(["of two layers", *ADAPTER_KINDS]),
    rank=st.sampled_from([3, 1]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
)


class Grown(Counted):
    """Which setting becomes larger."""

    what: Annotated[str, Field(pattern="^(rank|targets|length|rows)$")]


MORE: Mapping[str, Mapping[str, Any]] = {
    "rank": {"adapter.rank": 4},
    "targets": {"adapter.target_modules": "all-linear"},
    "length": {"tokens.max_length": 128},
    "rows": {"training.batch_size": 3},
}

MEMORY_GROWS = st.builds(Grown, model=MODELS, kind=st.just("of two layers"), what=st.sampled_from(list(MORE)))
