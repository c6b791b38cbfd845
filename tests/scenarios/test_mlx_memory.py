"""Laws of memory with MLX: nothing piles up, what a fresh process measures holds together, and running out is told."""

import gc
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import OutOfMemoryError
from finetune.evidence.memory import measure_framework, measure_memory
from finetune.records import Batch, ModelLocation
from support.tiny_mlx import adapted, make_model, mx
from support.tiny_models import VOCAB, make_rows, target_of

pytestmark = pytest.mark.tier2
ROWS = make_rows(7)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def location(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelLocation:
    """Each kind of model."""
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


def test_memory_does_not_grow_from_step_to_step(location: ModelLocation) -> None:
    """P-MEM: what lives between steps is weights, moments and nothing else, however many steps are done."""
    from finetune.backends.mlx.probe import moment_bytes, peak_tensors, weight_bytes

    gc.collect()
    mx.clear_cache()  # from which MLX hands out buffers of up to twice the size
    before = mx.get_active_memory()
    session = adapted(location, dropout=0.1)
    held, peaks = [], []
    for _ in range(6):
        peaks.append(peak_tensors(session, Batch(ROWS)))
        held.append(mx.get_active_memory())
    kept = weight_bytes(session) + moment_bytes(session)
    assert max(held) - before <= 1.1 * kept
    assert kept < max(peaks) <= 1.3 * min(peaks)
    adapter = sum(value.size for value in session._trainable().values())
    assert moment_bytes(session) == 2 * 4 * adapter


def test_out_of_memory_names_the_batch(location: ModelLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of memory is an error that names the batch and what to lower; any other error stays what it is."""
    session = adapted(location)

    def fail(words: str) -> None:
        def raiser(*_: Any) -> Any:
            raise RuntimeError(words)

        monkeypatch.setattr(session, "_slopes", raiser)

    fail("[malloc_or_wait] Unable to allocate 123 bytes.\nmore")
    with pytest.raises(OutOfMemoryError, match="out of memory with 7 rows of up to 23 tokens") as caught:
        session.accumulate(Batch(ROWS), 1.0)
    assert "training.batch_size" in caught.value.hint
    fail("[matmul] shape mismatch")
    with pytest.raises(RuntimeError, match="shape mismatch"):
        session.accumulate(Batch(ROWS), 1.0)


def test_fresh_processes_measure_lora_and_full_fine_tuning(tmp_path: Path) -> None:
    """LoRA has exactly its own gradients and moments, full fine-tuning those of every weight; peaks hold them all."""
    location = make_model("llama", tmp_path, hidden_size=96, intermediate_size=200)
    sizes = {"batch_size": 2, "length": 20, "dtype": "float32", "vocab_size": VOCAB}
    lora, full = (
        measure_memory("mlx", location, target_of("llama"), method=method, sizes=sizes)  # type: ignore[arg-type]
        for method in ("lora", "full")
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
