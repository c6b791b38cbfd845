"""Laws of two backends: the float64 reference and MLX compute, train and save the same thing, to float32's digits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from finetune.adapters.choose import choose_layers
from finetune.backends import open_backend
from finetune.chat.tokenizer import FileTokenizer
from finetune.models.locate import locate_model
from finetune.models.shape import read_shape
from finetune.records import AdapterTarget, Batch, ModelLocation, Optimization, TokenizedRow
from finetune_strategies.adapters import AdaptedModel, adapted_models
from finetune_strategies.datasets import token_rows
from finetune_strategies.models import llama_configs
from finetune_strategies.profiles import examples
from support.tiny_mlx import gradients, logits_of, open_session, set_weights
from support.tiny_models import batches_of, make_rows
from support.tolerances import apart, check_gradients

pytestmark = pytest.mark.tier2
ROWS = make_rows(7)


@pytest.fixture(scope="module")
def shipped() -> ModelLocation:
    """The shipped model."""
    return locate_model("reference-llama")


def open_both(location: ModelLocation) -> tuple[Any, Any]:
    """The model in the reference and in MLX."""
    return open_backend("reference").open(location, "float32", 0), open_session(location)


def attach_both(reference: Any, session: Any, target: AdapterTarget, *, trained: bool) -> None:
    """The same adapter on both, B zero or not."""
    reference.attach(target, 0)
    session.attach(target, 1)
    dice = np.random.default_rng(4)
    for tensor in reference.trainable.values() if trained else ():
        tensor += dice.normal(0, 0.1, tensor.shape)
    for tensor in reference.trainable.values():
        tensor[...] = tensor.astype(np.float32)
    set_weights(session, reference.trainable)


def all_layers(location: ModelLocation) -> AdapterTarget:
    """An adapter on every linear layer, whose scale is neither one nor whole."""
    return AdapterTarget(3, 7.0, 0.0, choose_layers(read_shape(location.folder), "all-linear"))


@given(adapted_models(llama_configs(vocab_size=97), paths=True, dropouts=(0.0,)), token_rows(1, 4))
@examples(1 / 3)
def test_tiny_llamas_agree(
    tmp_path_factory: pytest.TempPathFactory, model: AdaptedModel, rows: tuple[TokenizedRow, ...]
) -> None:
    """Logits, loss and the first gradient of each LoRA tensor agree, whatever the shape; names are the same."""
    folder = tmp_path_factory.mktemp("model")
    open_backend("reference").create(model.config, folder, 3)
    reference, session = open_both(ModelLocation("tiny", folder, "local"))
    for trained in (False, True):
        attach_both(reference, session, model.target, trained=trained)
        assert set(session.trainable_names()) == set(reference.trainable_names())
        assert session.fingerprints().keys() == reference.fingerprints().keys()
        found, wanted = session.accumulate(Batch(rows), 0.2), reference.accumulate(Batch(rows), 0.2)
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        check_gradients(gradients(session), reference.gradients)
        ids = rows[0].ids
        assert apart(logits_of(session, [ids])[0], reference.logits(ids)) < 1e-4


def test_losses_and_gradients_agree_on_the_shipped_model(shipped: ModelLocation) -> None:
    """Step-0 loss and the first gradient of each LoRA tensor agree to a ten-thousandth; so with every weight free."""
    for target in (all_layers(shipped), None):
        reference, session = open_both(shipped)
        if target:
            attach_both(reference, session, target, trained=True)
        else:
            reference.attach(None, 0), session.attach(None, 0)
        for batch in batches_of(ROWS, 3):
            assert session.accumulate(batch, 0.2) == pytest.approx(reference.accumulate(batch, 0.2), rel=1e-5)
        found = gradients(session)
        assert found.keys() == reference.gradients.keys()
        assert len(found) >= 38
        differences = {name: apart(found[name], wanted) for name, wanted in reference.gradients.items()}
        assert {name: share for name, share in differences.items() if share > 1e-4} == {}
        assert session.gradient_norms() == pytest.approx(reference.gradient_norms(), rel=1e-4)


def trace(session: Any) -> list[float]:
    """Loss and gradient norm of each of twenty steps, of two batches each."""
    session.prepare_updates(Optimization(weight_decay=0.05, max_grad_norm=1.0))
    told = []
    for number in range(20):
        batches = batches_of(make_rows(6, seed=number % 4), 4)
        targets = sum(batch.target_count for batch in batches)
        loss = sum(session.accumulate(batch, 1 / targets) for batch in batches) / targets
        told += [loss, session.clip_gradients()]
        session.update(0.003)
    return told


def test_training_goes_the_same_way(shipped: ModelLocation) -> None:
    """Twenty steps from one adapter: loss and gradient norm of each agree, and so do the logits at the end."""
    reference, session = open_both(shipped)
    attach_both(reference, session, all_layers(shipped), trained=False)
    wanted, found = trace(reference), trace(session)
    assert len(found) == 40
    assert found[-2] < 0.8 * found[8]
    assert found == pytest.approx(wanted, rel=1e-4)
    assert apart(logits_of(session, [ROWS[1].ids])[0], reference.logits(ROWS[1].ids)) < 1e-2


def test_greedy_answers_agree(shipped: ModelLocation) -> None:
    """Both say the same words after the same prompts, of equal and unequal lengths."""
    tokenizer = FileTokenizer(shipped.folder)
    texts = ("The", "What is the capital of", "Once upon", "The river", "A small test of what follows")
    prompts = [[tokenizer.bos_id or 0, *tokenizer.encode_content(text)] for text in texts]
    reference, session = open_both(shipped)
    answers = session.generate(prompts, 24, [tokenizer.eos_id])
    assert answers == reference.generate(prompts, 24, [tokenizer.eos_id])
    assert len({tuple(answer) for answer in answers}) >= 3


def test_adapters_and_models_are_exchanged_through_disk(shipped: ModelLocation, tmp_path: Path) -> None:
    """What either saves, an adapter or a whole model with it merged, the other opens, with the same logits."""
    reference, session = open_both(shipped)
    attach_both(reference, session, all_layers(shipped), trained=True)
    wanted = reference.logits(ROWS[1].ids)
    for name, writer in {"reference": reference, "mlx": session}.items():
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "model").mkdir()
        writer.save_adapter(tmp_path / name / "adapter")
        writer.save_model(tmp_path / name / "model")
        for fresh, location in (
            (open_both(shipped), None),
            (open_both(ModelLocation("merged", tmp_path / name / "model", "local")), "merged"),
        ):
            other = fresh[1] if writer is reference else fresh[0]
            if location is None:
                other.load_adapter(tmp_path / name / "adapter")
                assert other.trainable_names() == []
            logits = logits_of(other, [ROWS[1].ids])[0] if other is fresh[1] else other.logits(ROWS[1].ids)
            assert apart(logits, wanted) < 1e-4
