"""Laws of MLX's short ways: an adapter folded into its layer's weight computes what the layer beside it does."""

from pathlib import Path
from typing import Any

import pytest

from finetune.records import Batch
from support.sessions import batches_of, make_model, make_rows, need, step

need("mlx")
from finetune.backends.mlx import layers  # noqa: E402

pytestmark = pytest.mark.tier2
STEPS = 30


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of each weight that an adapter was folded into, in order."""
    found = []
    real = layers.through_folded

    def spy(x: Any, weight: Any, *factors: Any) -> Any:
        found.append(tuple(weight.shape))
        return real(x, weight, *factors)

    monkeypatch.setattr(layers, "through_folded", spy)
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_folded_adapters_train_as_those_beside_the_layer(
    kind: str, folded: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 30 steps each loss is that of the plain path, within 1e-5; every adapted layer is folded in every step."""
    bench = make_model(f"mlx-{kind}", tmp_path)
    batches = batches_of(make_rows(12), 4)

    def run() -> list[float]:
        session = bench.adapted()
        return [step(session, [batches[number % len(batches)]]) for number in range(STEPS)]

    short, count = run(), len(folded)
    monkeypatch.setattr(layers.AdaptedLinear, "_folds", lambda self, x: False)
    plain = run()
    assert len(folded) == count == STEPS * len(bench.adapted().adapter.layers)
    assert len(set(short)) == STEPS
    assert short == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("what", ["dropout", "dora", "bfloat16"])
def test_what_cannot_be_folded_is_not(what: str, folded: list[Any], tmp_path: Path) -> None:
    """Dropout reads another input, DoRA stretches, and half precision would round the adapter away."""
    bench = make_model("mlx-llama", tmp_path)
    target = bench.target(dropout=0.3 if what == "dropout" else 0.0, kind="dora" if what == "dora" else "lora")
    session = bench.adapted(target, dtype="bfloat16" if what == "bfloat16" else "float32")
    assert session.accumulate(Batch(make_rows(3)), 1.0) > 0
    assert not folded
