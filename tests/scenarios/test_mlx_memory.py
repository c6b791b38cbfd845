"""Memory with MLX: nothing piles up, and what a fresh process measures holds together."""

import gc
from pathlib import Path

import pytest

from finetune.evidence.memory import measure_framework, measure_memory
from finetune.records import Batch
from support.sessions import VOCAB, Bench, make_model, make_rows, need

need("mlx")
import mlx.core as mx  # noqa: E402

from finetune.backends.mlx.probe import moment_bytes, peak_tensors, weight_bytes  # noqa: E402

pytestmark = pytest.mark.tier2
ROWS = make_rows(7)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Each kind of model."""
    return make_model(f"mlx-{request.param}", tmp_path_factory.mktemp(request.param))


def test_memory_does_not_grow_from_step_to_step(bench: Bench) -> None:
    """What lives between steps is weights, moments and nothing else, however many steps are done."""
    gc.collect()
    mx.clear_cache()  # from which MLX hands out buffers of up to twice the size
    before = mx.get_active_memory()
    session = bench.adapted(bench.target(dropout=0.1))
    held, peaks = [], []
    for _ in range(6):
        peaks.append(peak_tensors(session, Batch(ROWS)))
        held.append(mx.get_active_memory())
    kept = weight_bytes(session) + moment_bytes(session)
    assert max(held) - before <= 1.1 * kept
    assert kept < max(peaks) <= 1.3 * min(peaks)
    adapter = sum(value.size for value in session._trainable().values())
    assert moment_bytes(session) == 2 * 4 * adapter


def test_fresh_processes_measure_lora_and_full_fine_tuning(tmp_path: Path) -> None:
    """LoRA has exactly its own gradients and moments, full fine-tuning those of every weight; peaks hold them all."""
    bench = make_model("mlx-llama", tmp_path, hidden_size=96, intermediate_size=200)
    sizes = {"batch_size": 2, "length": 20, "dtype": "float32", "vocab_size": VOCAB}
    lora, full = (
        measure_memory("mlx", bench.location, bench.target(), method=method, sizes=sizes) for method in ("lora", "full")
    )
    adapter = 2 * 3 * ((96 + 18) + (96 + 6) + (200 + 96)) * 4
    assert (lora.gradient_bytes, lora.optimizer_bytes) == (adapter, 2 * adapter)
    assert (full.gradient_bytes, full.optimizer_bytes) == (full.weight_bytes, 2 * full.weight_bytes)
    assert lora.weight_bytes == full.weight_bytes + adapter
    for found in (lora, full):
        assert found.peak_tensors > found.weight_bytes + found.gradient_bytes + found.optimizer_bytes
        assert found.peak_rss > found.framework_rss > 20e6
    assert full.peak_tensors > lora.peak_tensors
    assert measure_framework("mlx") == pytest.approx(lora.framework_rss, rel=0.2)
