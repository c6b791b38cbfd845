"""Adapters, whole and damaged."""

from typing import Annotated

from hypothesis import strategies as st
from pydantic import Field

from finetune.adapters.kinds import ADAPTER_KINDS
from finetune_strategies.cases.learned import KINDS, ONE_ROW, Learned, learned

ADAPTER_TRAVELS = learned()


class Spoilt(Learned):
    """An adapter of which one tensor is spoilt, this one in the order of their names."""

    how: Annotated[str, Field(pattern="^(missing|renamed|reshaped|added)$")]
    which: Annotated[int, Field(ge=0, le=5)]


ADAPTER_DAMAGED = st.builds(
    Spoilt,
    rows=ONE_ROW,
    how=st.sampled_from(["missing", "renamed", "reshaped", "added"]),
    which=st.sampled_from([0, 5]),
)

ADAPTER_OTHER_BASE = st.builds(Learned, rows=ONE_ROW)
ADAPTER_FROZEN = st.builds(Learned, rows=ONE_ROW, kind=st.sampled_from(list(ADAPTER_KINDS)))
ADAPTER_COMPLETE = st.builds(Learned, rows=ONE_ROW, kind=st.sampled_from(list(KINDS)))
