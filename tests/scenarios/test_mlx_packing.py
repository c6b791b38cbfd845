"""Laws of packing with MLX: rows that share a sequence learn as if each were alone, or the run is refused."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import TrainingError
from finetune.records import Batch
from finetune.training.packing_check import check_packing
from finetune_strategies.profiles import examples
from support.tiny_mlx import accumulated, adapted, close, make_model, open_session
from support.tiny_models import make_rows, train_a_little

pytestmark = pytest.mark.tier2
ROWS = make_rows(7)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3_text"])
def by_distance(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A session with a trained adapter on models that know distances only, one with a window of attention."""
    changes: dict[str, Any] = {} if request.param == "llama" else {"model_type": request.param}
    if request.param == "qwen2":
        changes |= {"hidden_size": 24, "head_dim": 8}
    if request.param == "gemma3_text":
        window = {"sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 6}
        changes |= {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", **window}
    session = adapted(make_model("llama", tmp_path_factory.mktemp(request.param), **changes))
    train_a_little(session)
    return session


@given(st.permutations(range(len(ROWS))), st.lists(st.integers(1, 3), min_size=7, max_size=7))
@examples(1 / 6)
def test_rows_that_share_a_sequence_do_not_see_each_other(by_distance: Any, order: list[int], sizes: list[int]) -> None:
    """P-PACK: packed in any order and grouping, loss and gradients are those of the rows apart."""
    counts: list[int] = []
    for size in sizes:
        counts += [min(size, len(ROWS) - sum(counts))] if sum(counts) < len(ROWS) else []
    packed = Batch(tuple(ROWS[index] for index in order), tuple(counts))
    together, apart = accumulated(by_distance, packed), accumulated(by_distance, Batch(ROWS))
    assert together[0] == pytest.approx(apart[0], rel=1e-5)
    assert close(together[1], apart[1], 1e-3)
    assert by_distance.loss(packed) == pytest.approx(apart[0], rel=1e-5)
    check_packing(by_distance, packed, "float32")


def test_packing_is_refused_where_rows_would_mix(tmp_path: Path) -> None:
    """GPT-2 counts positions, which mlx-lm lets nobody give: packing is refused before the first step."""
    session = open_session(make_model("gpt2", tmp_path))
    with pytest.raises(TrainingError, match="does not keep rows apart"):
        check_packing(session, Batch(ROWS[:4], (4,)), "float32")
