"""Laws of the drawn models where a real framework makes them: their files have the shape that was counted by hand."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given

pytest.importorskip("torch", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("transformers", reason="needs the torch extra: pip install 'finetune-suite[torch]'")

from finetune.backends import open_backend
from finetune.models.shape import read_shape
from finetune.records import Batch, ModelLocation, Optimization
from finetune_strategies.adapters import AdaptedModel, adapted_layers, adapted_models
from finetune_strategies.models import model_configs
from finetune_strategies.profiles import examples
from support.tiny_llamas import VOCAB, make_rows

pytestmark = pytest.mark.tier2


@given(adapted_models(model_configs(vocab_size=VOCAB)))
@examples(1 / 3)
def test_model_made_by_torch_has_the_shape_and_takes_the_adapter(model: AdaptedModel) -> None:
    """Llamas and GPT-2s have the drawn shape in their files, and PEFT adapts exactly the layers that were meant."""
    with tempfile.TemporaryDirectory() as name:
        backend = open_backend("torch")
        backend.create(model.config, Path(name), 0)
        assert read_shape(Path(name)) == model.shape
        session = backend.open(ModelLocation("drawn", Path(name), "local"), "float32", 0)
        session.attach(model.target, 0)
        session.prepare_updates(Optimization(weight_decay=0.0, max_grad_norm=1.0))
        adapted = {tensor.split(".lora_")[0].removeprefix("base_model.model.") for tensor in session.trainable_names()}
        assert adapted == {layer.name for layer in adapted_layers(model.shape, model.target)}
        assert session.loss(Batch(make_rows(2))) > 0
