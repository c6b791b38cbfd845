"""Laws of a saved adapter that is put on a model with torch: it answers, and it is not trained by accident."""

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")

from finetune.errors import TrainingError
from finetune.records import Batch
from support.tiny_models import adapted, make_model, make_rows, open_session, train_a_little

pytestmark = pytest.mark.tier2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loaded_adapter_is_frozen(kind: str, tmp_path: Path) -> None:
    """P-GRAD: nothing of a model with a loaded adapter is trainable, and training it is an error, not a no-op."""
    location = make_model(kind, tmp_path / "model")
    session = adapted(location)
    train_a_little(session)
    (tmp_path / "adapter").mkdir()
    session.save_adapter(tmp_path / "adapter")
    loaded = open_session(location)
    loaded.load_adapter(tmp_path / "adapter")
    assert loaded.trainable_names() == []
    before = loaded.fingerprints()
    with pytest.raises((RuntimeError, TrainingError), match=r"grad|trainable"):
        loaded.accumulate(Batch(make_rows(3)), 1.0)
    assert loaded.fingerprints() == before
