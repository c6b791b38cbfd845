"""Laws of two backends: the float64 reference and torch with PEFT compute, train and save the same thing.

transformers computes some parts of a Llama in float32 whatever the model's dtype. Where ten digits are compared its
own code runs here with those parts widened to float64; nothing of it is written anew.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
transformers = pytest.importorskip("transformers", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")

from transformers.models.llama import modeling_llama  # noqa: E402

from finetune.adapters.choose import choose_layers  # noqa: E402
from finetune.backends import open_backend  # noqa: E402
from finetune.chat.tokenizer import FileTokenizer  # noqa: E402
from finetune.models.locate import locate_model  # noqa: E402
from finetune.models.shape import read_shape  # noqa: E402
from finetune.records import AdapterTarget, Batch, ModelLocation, Optimization, TokenizedRow  # noqa: E402
from support.tiny_models import CONFIGS, VOCAB, batches_of, make_model, make_rows  # noqa: E402
from support.tolerances import apart  # noqa: E402

pytestmark = pytest.mark.tier2
IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPES: dict[str, dict[str, Any]] = {
    "odd": {},
    "tied": {"tie_word_embeddings": True, "num_hidden_layers": 1, "hidden_size": 27, "head_dim": 10},
    "all heads": {"num_key_value_heads": 3, "rms_norm_eps": 1e-2, "intermediate_size": 5},
    "five on one": {"num_attention_heads": 5, "hidden_size": 15, "head_dim": 2, "rope_theta": 30.0},
    "six on two": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 24, "head_dim": None},
}
ROWS = make_rows(7)


@contextmanager
def widened() -> Iterator[None]:
    """Let transformers compute what it computes in float32 in float64."""

    class Wide(ModuleType):
        float = float32 = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    wide = patch.object(modeling_llama, "torch", Wide("torch"))
    with wide, patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


@pytest.fixture(scope="module", params=["reference-llama", "by torch", *SHAPES])
def location(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelLocation:
    """The shipped model, one that torch made, and some that the reference made."""
    if request.param == "reference-llama":
        return locate_model(request.param)
    folder = tmp_path_factory.mktemp("model")
    if request.param == "by torch":
        return make_model("llama", folder, tie_word_embeddings=True, hidden_size=27)
    config = {**IDS, **CONFIGS["llama"], **SHAPES[request.param]}
    open_backend("reference").create({key: value for key, value in config.items() if value is not None}, folder, 3)
    return ModelLocation(request.param, folder, "local")


@pytest.fixture
def shipped() -> ModelLocation:
    """The shipped model."""
    return locate_model("reference-llama")


def open_both(location: ModelLocation, *, double: bool = True) -> tuple[Any, Any]:
    """The model in the reference and in torch."""
    ours = open_backend("reference").open(location, "float32", 0)
    theirs: Any = open_backend("torch").open(location, "float32", 0)
    if double:
        theirs.model.double()
    return ours, theirs


def target_of(location: ModelLocation, dropout: float = 0.0) -> AdapterTarget:
    """An adapter on every linear layer, whose scale is neither one nor whole."""
    return AdapterTarget(3, 7.0, dropout, choose_layers(read_shape(location.folder), "all-linear"))


def attach_both(ours: Any, theirs: Any, *, trained: bool = True) -> None:
    """The same adapter on both, B zero or not."""
    target = target_of(ours.location)
    ours.attach(target, 0)
    theirs.attach(target, 1)
    theirs.model.to(next(theirs.model.parameters()).dtype)
    dice = np.random.default_rng(4)
    for tensor in ours.trainable.values() if trained else ():
        tensor += dice.normal(0, 0.1, tensor.shape)
    named = dict(theirs.model.named_parameters())
    with torch.no_grad():
        for name, tensor in ours.trainable.items():
            named[name].copy_(torch.from_numpy(tensor))


def logits_of(session: Any, row: TokenizedRow) -> Any:
    """The logits after each token, in torch, nothing rounded."""
    session.model.eval()
    with torch.no_grad():
        return session.model(input_ids=torch.tensor([row.ids])).logits[0].numpy()


def gradients_of(session: Any) -> dict[str, Any]:
    """Each gradient that torch found."""
    return {name: value.grad.numpy() for name, value in session.model.named_parameters() if value.grad is not None}


def test_logits_agree(location: ModelLocation) -> None:
    """Base and adapted logits agree to nine digits on rows of every length."""
    with widened():
        ours, theirs = open_both(location)
        assert all(apart(ours.logits(row.ids), logits_of(theirs, row)) < 1e-9 for row in ROWS)
        attach_both(ours, theirs)
        assert all(apart(ours.logits(row.ids), logits_of(theirs, row)) < 1e-9 for row in ROWS)
        with ours.adapter_disabled(), theirs.adapter_disabled():
            assert apart(ours.logits(ROWS[1].ids), logits_of(theirs, ROWS[1])) < 1e-9


@pytest.mark.parametrize("full", [False, True])
def test_gradients_agree(location: ModelLocation, full: bool) -> None:
    """Loss and gradient of each trainable tensor, on padded batches, are those of torch's autograd to nine digits."""
    with widened():
        ours, theirs = open_both(location)
        if full:
            ours.attach(None, 0), theirs.attach(None, 0)
        else:
            attach_both(ours, theirs)
        for batch in batches_of(ROWS, 3):
            assert ours.accumulate(batch, 0.2) == pytest.approx(theirs.accumulate(batch, 0.2), rel=1e-9)
        wanted = gradients_of(theirs)
    assert list(wanted) == ours.trainable_names() == theirs.trainable_names()
    assert len(wanted) >= 11
    differences = {name: apart(ours.gradients[name], wanted[name]) for name in wanted}
    assert {name: share for name, share in differences.items() if share > 1e-9} == {}
    assert ours.gradient_norms() == pytest.approx(theirs.gradient_norms(), rel=1e-9)


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


@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-9), (False, 1e-4)])
def test_training_goes_the_same_way(shipped: ModelLocation, double: bool, tolerance: float) -> None:
    """Twenty steps from one adapter: loss and gradient norm of each agree, to rounding of the dtype that torch uses."""
    if double:
        with widened():
            ours, theirs = open_both(shipped)
            attach_both(ours, theirs, trained=False)
            wanted = trace(theirs)
    else:
        ours, theirs = open_both(shipped, double=False)
        attach_both(ours, theirs, trained=False)
        wanted = trace(theirs)
    found = trace(ours)
    assert len(found) == 40
    assert found[-2] < 0.8 * found[8]
    assert found == pytest.approx(wanted, rel=tolerance)
    with widened():
        assert apart(ours.logits(ROWS[1].ids), logits_of(theirs, ROWS[1])) < 100 * tolerance


def test_greedy_answers_agree(shipped: ModelLocation) -> None:
    """Both say the same words after the same prompts, of equal and unequal lengths."""
    tokenizer = FileTokenizer(shipped.folder)
    texts = ("The", "What is the capital of", "Once upon", "The river", "A small test of what follows")
    prompts = [[tokenizer.bos_id or 0, *tokenizer.encode_content(text)] for text in texts]
    ours, theirs = open_both(shipped, double=False)
    answers = ours.generate(prompts, 24, [tokenizer.eos_id])
    assert answers == theirs.generate(prompts, 24, [tokenizer.eos_id])
    assert len({tuple(answer) for answer in answers}) >= 3


def test_adapters_are_exchanged_through_disk(location: ModelLocation, tmp_path: Path) -> None:
    """What either saves the other loads, with the same logits; names of tensors are the same strings in both."""
    for name, (writer, reader) in {"to torch": (0, 1), "to reference": (1, 0)}.items():
        both = open_both(location, double=False)
        assert set(both[0].fingerprints()) == set(both[1].fingerprints())
        assert both[0].trainable_names() == both[1].trainable_names()
        attach_both(*both)
        assert set(both[0].fingerprints()) == set(both[1].fingerprints())
        assert both[0].trainable_names() == both[1].trainable_names()
        (tmp_path / name).mkdir()
        both[writer].save_adapter(tmp_path / name)
        fresh = open_both(location, double=False)[reader]
        fresh.load_adapter(tmp_path / name)
        assert fresh.trainable_names() == []
        again = fresh.logits(ROWS[1].ids) if reader == 0 else logits_of(fresh, ROWS[1])
        assert apart(again, both[0].logits(ROWS[1].ids)) < 1e-5
        assert apart(again, both[1 - reader].logits(ROWS[1].ids) if reader else logits_of(both[1], ROWS[1])) < 1e-5


def test_saved_models_are_exchanged_through_disk(location: ModelLocation, tmp_path: Path) -> None:
    """A model saved by either, in bfloat16 by torch, is opened by the other, bit for bit; merged is what was merged."""
    ours, theirs = open_both(location, double=False)
    ours.attach(target_of(location), 0)
    for parts in ours.adapter.layers.values():
        parts["B"] += 0.1
    for name, session in {"ours": ours, "theirs": theirs}.items():
        (tmp_path / name).mkdir()
        if session is theirs:
            session.model.bfloat16()
        session.save_model(tmp_path / name)
    merged = open_both(ModelLocation("merged", tmp_path / "ours", "local"))[1]
    with widened():
        assert apart(logits_of(merged, ROWS[1]), ours.logits(ROWS[1].ids)) < 1e-5
    half = open_both(ModelLocation("half", tmp_path / "theirs", "local"))[0]
    named = dict(theirs.model.named_parameters())
    assert half.weights.keys() == named.keys()
    assert all(np.array_equal(half.weights[name], named[name].detach().double().numpy()) for name in named)


def test_losses_agree_on_batches(location: ModelLocation) -> None:
    """Evaluation loss agrees to the digits of float32."""
    ours, theirs = open_both(location, double=False)
    assert ours.loss(Batch(ROWS)) == pytest.approx(theirs.loss(Batch(ROWS)), rel=1e-5)
