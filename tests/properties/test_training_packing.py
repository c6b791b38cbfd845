"""Laws of packing in training: a model that mixes rows is refused, one that keeps them apart is not."""

from dataclasses import dataclass
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import TrainingError
from finetune.records import Batch
from finetune.training.packing_check import check_packing
from support.tiny_llamas import ROWS, adapted

PACKED = Batch(ROWS[:4], (4,))


@dataclass
class Leaky:
    """A model in which rows that share a sequence change each other's loss by a share."""

    leak: float

    def loss(self, batch: Batch) -> float:
        """Ten nats a row, and more of them where rows share."""
        return 10.0 * len(batch.rows) * (1 + self.leak * bool(batch.packed))


@given(st.sampled_from([1, -1]), st.floats(2, 1e6))
def test_packing_model_that_mixes_rows_is_refused(sign: int, factor: float) -> None:
    """A loss that packing changes by more than rounding is refused with both losses and what to set, NaN too."""
    for dtype, rounding in (("float32", 1e-4), ("bfloat16", 2e-2)):
        for leak in (sign * factor * rounding, float("nan")):
            with pytest.raises(TrainingError, match="share a sequence") as caught:
                check_packing(cast(Any, Leaky(leak)), PACKED, dtype)
            assert "training.packing" in caught.value.hint
        check_packing(cast(Any, Leaky(sign * rounding / factor)), PACKED, dtype)


def test_packing_real_model_is_accepted_and_left_as_it_was() -> None:
    """The reference Llama keeps rows apart; without rows that share a sequence there is nothing to check."""
    session = adapted(trained=True)
    before = session.fingerprints()
    check_packing(session, PACKED, "float32")
    check_packing(session, None, "float32")
    assert session.fingerprints() == before
