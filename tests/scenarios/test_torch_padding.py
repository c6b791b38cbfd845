"""Laws of padding with torch: what pads is told by its place, never by its id."""

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")

from finetune.records import Batch, TokenizedRow
from support.tiny_models import NO_DROPOUT, VOCAB, make_model, make_rows, open_session

pytestmark = pytest.mark.tier2
PAD = VOCAB - 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_id_that_is_trained_counts(kind: str, tmp_path: Path) -> None:
    """P-STOP: a trained token whose id is also the padding's, as where padding is the end of text, carries its loss."""
    location = make_model(kind, tmp_path, **(NO_DROPOUT if kind == "gpt2" else {}))
    rows = tuple(TokenizedRow((*row.ids, PAD), (*row.trained, True), row.where) for row in make_rows(5))
    padded, other = open_session(location, pad_id=PAD), open_session(location, pad_id=0)
    alone = sum(other.loss(Batch((row,))) for row in rows)
    assert padded.loss(Batch(rows)) == pytest.approx(alone, rel=1e-5)
    unmarked = tuple(TokenizedRow(row.ids, (*row.trained[:-1], False), row.where) for row in rows)
    assert padded.loss(Batch(unmarked)) < alone - 1
