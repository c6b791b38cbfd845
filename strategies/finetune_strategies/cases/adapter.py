"""Adapters, whole and damaged."""

from typing import Annotated, Literal

from hypothesis import strategies as st
from pydantic import Field

from finetune.adapters.kinds import ADAPTER_KINDS
from finetune_strategies.cases.learned import KINDS, ONE_ROW, Learned, learned
from finetune_strategies.recipes import Recipe

ADAPTER_TRAVELS = learned()


class Spoilt(Learned):
    """An adapter of which one tensor is spoilt, this one in the order of their names, or all of its layer."""

    how: Annotated[str, Field(pattern="^(missing|renamed|reshaped|added|moved)$")]
    which: Annotated[int, Field(ge=0, le=5)]


ADAPTER_DAMAGED = st.builds(
    Spoilt,
    rows=ONE_ROW,
    how=st.sampled_from(["missing", "moved", "renamed", "reshaped", "added"]),
    which=st.sampled_from([0, 5]),
)

ADAPTER_OTHER_BASE = st.builds(Learned, rows=ONE_ROW)
ADAPTER_FROZEN = st.builds(Learned, rows=ONE_ROW, kind=st.sampled_from(list(ADAPTER_KINDS)))
ADAPTER_COMPLETE = st.builds(Learned, rows=ONE_ROW, kind=st.sampled_from(list(KINDS)))


class Deep(Recipe):
    """How many blocks a model has, and the layers that an adapter is to sit on."""

    blocks: Annotated[int, Field(ge=2, le=4)]
    layers: Annotated[tuple[Literal["q_proj", "v_proj", "down_proj"], ...], Field(min_length=1, strict=False)]


ADAPTER_BLOCKS = st.builds(
    Deep, blocks=st.integers(2, 4), layers=st.sampled_from([("q_proj", "v_proj"), ("down_proj",), ("q_proj",)])
)
ADAPTER_PLACELESS = st.builds(Learned, rows=ONE_ROW, kind=st.sampled_from(list(ADAPTER_KINDS)))
