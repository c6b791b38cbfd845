"""Adapters to merge, into bases of several kinds."""

from typing import Annotated, Any

from hypothesis import strategies as st
from pydantic import Field

from finetune.adapters.kinds import ADAPTER_KINDS
from finetune.records import DEFAULT_KIND
from finetune_strategies.cases.adapter import Spoilt
from finetune_strategies.cases.learned import ONE_ROW, Learned, learned
from finetune_strategies.cases.rows import one_of
from finetune_strategies.recipes import CONTROL_TOKENS


class Merging(Learned):
    """What is merged, into a base whose head may be tied."""

    tied: bool = False


MERGING = st.builds(
    Merging,
    rows=ONE_ROW,
    model=learned().map(lambda case: case.model),
    kind=st.sampled_from([*ADAPTER_KINDS, "of two layers", "rank-stabilised"]),
    tied=st.booleans(),
)

MERGE_EXACT = st.builds(Merging, rows=ONE_ROW, kind=st.sampled_from([DEFAULT_KIND, "of two layers"]))
MERGE_LEAVES = st.builds(Merging, rows=ONE_ROW)
MERGE_WHOLE = st.builds(Learned, rows=ONE_ROW)


class Named(Merging):
    """A run that learns a token of the tokenizer's own, too."""

    token: Annotated[str, Field(pattern=one_of(CONTROL_TOKENS))]

    @property
    def settings(self) -> dict[str, Any]:
        """Quick ones, and the token to learn."""
        return {**super().settings, "tokens.add_special_tokens": [self.token]}


MERGE_ROWS = st.builds(Named, rows=ONE_ROW, token=st.sampled_from(["<|im_start|>", "<|im_end|>"]), tied=st.booleans())


class Large(Learned):
    """A base that holds a weight of this size."""

    size: Annotated[float, Field(gt=0)]


MERGE_OVERFLOW = st.builds(Large, rows=ONE_ROW, size=st.sampled_from([7e4, 6e4]))
MERGE_TIED_APART = st.builds(Learned, rows=ONE_ROW)
MERGE_DAMAGED = st.builds(
    Spoilt, rows=ONE_ROW, how=st.sampled_from(["moved", "missing", "reshaped", "renamed"]), which=st.just(0)
)


class Halved(Merging):
    """What is merged into a base that is kept in float16."""


MERGE_HALF = st.builds(Halved, rows=ONE_ROW, kind=st.sampled_from([DEFAULT_KIND, "of two layers"]))
