"""Laws of padding in the reference backend: what pads is told by its place, never by its id."""

import pytest

from finetune.records import Batch, TokenizedRow
from support.tiny_llamas import ROWS, VOCAB, tiny

PAD = 96


@pytest.mark.parametrize("packed", [(), (2, 1)])
def test_padding_id_that_is_trained_counts(packed: tuple[int, ...]) -> None:
    """P-STOP: a trained token whose id is also the padding's, as where padding is the end of text, carries its loss."""
    assert VOCAB == PAD + 1
    rows = tuple(TokenizedRow((*row.ids, PAD), (*row.trained, True), row.where) for row in ROWS[:3])
    padded, other = tiny(pad_id=PAD), tiny(pad_id=0)
    alone = sum(other.loss(Batch((row,))) for row in rows)
    assert padded.loss(Batch(rows, packed)) == pytest.approx(alone, rel=1e-12)
    unmarked = tuple(TokenizedRow(row.ids, (*row.trained[:-1], False), row.where) for row in rows)
    assert padded.loss(Batch(unmarked, packed)) < alone - 1
