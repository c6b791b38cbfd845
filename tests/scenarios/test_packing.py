"""Rows that share a sequence learn as if each were alone, in torch and MLX, or the run is refused."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.backends import open_backend
from finetune.errors import TrainingError
from finetune.evidence.packing_check import check_packing
from finetune.records import Batch
from finetune_strategies.profiles import examples
from support.sessions import NO_DROPOUT, VOCAB, accumulated, make_model, make_rows
from support.tolerances import apart

pytestmark = pytest.mark.tier2
ROWS = make_rows(9)
MODELS: dict[str, dict[str, Any]] = {
    "torch-llama": {},
    "torch-gpt2": NO_DROPOUT,
    "torch-llama mistral": {"model_type": "mistral", "sliding_window": 5},
    "torch-llama qwen2": {"model_type": "qwen2"},
    "mlx-llama": {},
    "mlx-llama qwen2": {"model_type": "qwen2", "hidden_size": 24, "head_dim": 8},
    "mlx-llama gemma3": {
        "model_type": "gemma3_text",
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 6,
    },
}
"""Models that know positions, distances only, or see through a window."""


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A session with a trained adapter on each kind of model."""
    bench = request.param.partition(" ")[0]
    return make_model(bench, tmp_path_factory.mktemp("model"), **MODELS[request.param]).trained()


@given(st.permutations(range(len(ROWS))), st.lists(st.integers(1, 4), min_size=9, max_size=9))
@examples(1 / 5)
def test_rows_that_share_a_sequence_do_not_see_each_other(trained: Any, order: list[int], sizes: list[int]) -> None:
    """Packed in any order and grouping, loss and gradients are those of the rows apart."""
    counts: list[int] = []
    for size in sizes:
        counts += [min(size, len(ROWS) - sum(counts))] if sum(counts) < len(ROWS) else []
    packed = Batch(tuple(ROWS[index] for index in order), tuple(counts))
    (together, found), (alone, wanted) = accumulated(trained, packed), accumulated(trained, Batch(ROWS))
    assert together == pytest.approx(alone, rel=1e-5)
    assert found.keys() == wanted.keys()
    assert {name: share for name in wanted if (share := apart(found[name], wanted[name])) > 1e-3} == {}
    assert trained.loss(packed) == pytest.approx(alone, rel=1e-5)
    check_packing(trained, packed, "float32")


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_model_that_mixes_rows_is_refused(backend: str, tmp_path: Path) -> None:
    """What cannot keep rows apart is found out before the first step: positions that nobody can give, or no positions.

    mlx-lm lets nobody give GPT-2 its positions; Bloom turns distance into a bias of attention.
    """
    bench = make_model(f"{backend}-gpt2", tmp_path)
    if backend == "torch":
        sizes = {"hidden_size": 20, "n_head": 5, "n_layer": 2, "vocab_size": VOCAB, "initializer_range": 0.3}
        open_backend("torch").create({"model_type": "bloom", **sizes}, tmp_path, seed=5)
    with pytest.raises(TrainingError, match="does not keep rows apart"):
        check_packing(bench.open(), Batch(ROWS[:4], (4,)), "float32")
