"""Laws of packing with torch: rows that share a sequence learn as if each were alone, or the run is refused."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("transformers", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")

from finetune.data.batches import epoch_batches  # noqa: E402
from finetune.errors import TrainingError  # noqa: E402
from finetune.records import Batch, ModelLocation  # noqa: E402
from finetune.training.packing_check import check_packing  # noqa: E402
from finetune_strategies.profiles import examples  # noqa: E402
from support.tiny_models import (  # noqa: E402
    NO_DROPOUT,
    VOCAB,
    adapted,
    batches_of,
    make_model,
    make_rows,
    open_session,
    step,
    train_a_little,
)

pytestmark = pytest.mark.tier2
ROWS = make_rows(9)
# A model that turns distance into a bias of attention and knows no positions: it cannot be told who shares a sequence.
BLOOM = {
    "model_type": "bloom",
    "hidden_size": 20,
    "n_head": 5,
    "n_layer": 2,
    "vocab_size": VOCAB,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral", "qwen2"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A session with a trained adapter on each kind of model, one of them with a sliding window of attention."""
    changes: dict[str, Any] = NO_DROPOUT if request.param == "gpt2" else {}
    if request.param in ("mistral", "qwen2"):
        changes = {"model_type": request.param, **({"sliding_window": 5} if request.param == "mistral" else {})}
    kind = "gpt2" if request.param == "gpt2" else "llama"
    session = adapted(make_model(kind, tmp_path_factory.mktemp(request.param), **changes))
    train_a_little(session)
    return session


def gradients(session: Any) -> dict[str, Any]:
    """A copy of every gradient there is, which are cleared."""
    found = {name: value.grad.clone() for name, value in session.model.named_parameters() if value.grad is not None}
    session.optimizer.zero_grad(set_to_none=True)
    return found


@given(st.permutations(range(len(ROWS))), st.lists(st.integers(1, 4), min_size=9, max_size=9))
@examples(1 / 4)
def test_rows_that_share_a_sequence_do_not_see_each_other(trained: Any, order: list[int], sizes: list[int]) -> None:
    """P-PACK: packed in any order and grouping, loss and gradients are those of the rows apart."""
    counts: list[int] = []
    for size in sizes:
        counts += [min(size, len(ROWS) - sum(counts))] if sum(counts) < len(ROWS) else []
    packed = Batch(tuple(ROWS[index] for index in order), tuple(counts))
    apart = trained.accumulate(Batch(ROWS), 0.1)
    wanted = gradients(trained)
    assert trained.accumulate(packed, 0.1) == pytest.approx(apart, rel=1e-5)
    found = gradients(trained)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-3, atol=1e-5) for name in wanted)
    assert trained.loss(packed) == pytest.approx(trained.loss(Batch(ROWS)), rel=1e-5)
    check_packing(trained, packed, "float32")


def test_model_that_mixes_rows_is_refused(tmp_path: Path) -> None:
    """A real architecture that cannot keep rows apart is found out before the first step."""
    from finetune.backends import open_backend

    open_backend("torch").create(BLOOM, tmp_path, seed=5)
    session = open_session(ModelLocation("bloom", tmp_path, "local"))
    with pytest.raises(TrainingError, match="does not keep rows apart"):
        check_packing(session, Batch(ROWS[:4], (4,)), "float32")


def test_packed_epoch_learns_what_a_padded_one_learns(tmp_path: Path) -> None:
    """A full-batch step on packed rows moves the weights as one on padded rows does."""
    location = make_model("llama", tmp_path / "model")
    first, second = adapted(location), adapted(location)
    [packed] = epoch_batches(ROWS, 50, seed=0, epoch=0, pack_length=40)
    assert packed.packed
    assert step(first, [packed]) == pytest.approx(step(second, batches_of(ROWS, 4)), rel=1e-5)
    moved = {name: value for name, value in first.model.named_parameters() if value.requires_grad}
    other = dict(second.model.named_parameters())
    assert all(torch.allclose(value, other[name], rtol=1e-3, atol=1e-5) for name, value in moved.items())
