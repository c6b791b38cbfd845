"""Laws of where a model computes: what is asked for is taken or refused, never something else; a GPU computes the same.

The laws that need a GPU have no other way to fail than on one; where there is none they say so and are skipped.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.backends import open_backend
from finetune.backends.reference.backend import ReferenceBackend
from finetune.backends.torch.device import choose_device
from finetune.config import load_config
from finetune.errors import FineTuneError, RefusedError
from finetune.evidence.reopen import compare, reopen
from finetune.evidence.talk import talker
from finetune.export.gguf_source import exportable_run
from finetune.records import Batch
from finetune.train import fine_tune
from support.sessions import Bench, make_model, make_rows, step

pytestmark = pytest.mark.tier2
ROWS = make_rows(7)
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU, and a torch built for it (pip install torch)"
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A tiny Llama."""
    return make_model("torch-llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("wanted", "seen", "together", "taken"),
    [
        ("cpu", True, False, "cpu"),
        ("auto", True, False, "cuda"),
        ("gpu", True, False, "cuda"),
        ("cpu", False, False, "cpu"),
        ("auto", False, False, "cpu"),
        ("gpu", False, False, None),
        ("cpu", True, True, "cpu"),
        ("auto", True, True, "cpu"),
        ("gpu", True, True, None),
        ("gpu", False, True, None),
    ],
)
def test_device_is_the_one_asked_for_or_refused(
    wanted: str, seen: bool, together: bool, taken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is taken where there is one and the run is alone; asked for by name where that is not so, it is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value) if together else monkeypatch.delenv(name, raising=False)
    if taken is not None:
        assert choose_device(wanted).type == taken
        return
    with pytest.raises(RefusedError, match=r"model\.device is gpu, but") as caught:
        choose_device(wanted)
    assert "model.device" in str(caught.value.hint)


@pytest.mark.parametrize("backend", ["torch", "mlx", "reference"])
def test_gpu_that_is_not_there_is_refused_and_leaves_nothing(backend: str, tmp_path: Path) -> None:
    """`model.device: gpu` on a machine without one ends before anything is written, whatever the backend."""
    if backend == "mlx":
        mx = pytest.importorskip("mlx.core", reason="needs the mlx extra: pip install 'finetune-suite[mlx]'")
        pytest.importorskip("mlx_lm", reason="needs the mlx extra: pip install 'finetune-suite[mlx]'")
        if mx.is_available(mx.gpu):
            pytest.skip("needs a machine whose GPU MLX does not see: run it with mlx[cpu]")
    if backend == "torch" and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU: hide it with CUDA_VISIBLE_DEVICES=")
    settings = {"backend": backend, "model.device": "gpu", "training.max_steps": 2}
    with pytest.raises(FineTuneError, match=r"model\.device is gpu, but") as caught:
        fine_tune(load_config(None, environ={}, overrides=settings, profile=None), output=tmp_path / "run")
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_state_of_another_kind_of_device_is_refused_and_changes_nothing(bench: Bench, tmp_path: Path) -> None:
    """What was saved with a GPU's random numbers cannot go on exactly without one."""
    session = bench.adapted(bench.target(dropout=0.3))
    step(session, [Batch(ROWS)])
    session.save_state(tmp_path)
    path = tmp_path / "state.safetensors"
    save_file({**load_file(path), "random/gpu": torch.zeros(16, dtype=torch.uint8)}, path)
    fresh = bench.adapted(bench.target(dropout=0.3), seed=5)
    before = fresh.fingerprints()
    with pytest.raises(RefusedError, match="random/gpu"):
        fresh.load_state(tmp_path)
    assert fresh.fingerprints() == before
    assert fresh.device == "cpu"


def test_whatever_opens_a_runs_model_opens_it_where_the_run_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, its control, scoring again, talking and exporting ask for the device of the run's settings."""
    found = []
    real = ReferenceBackend.open

    def spy(self: Any, *given: Any, **named: Any) -> Any:
        found.append(named.get("device"))
        return real(self, *given, **named)

    monkeypatch.setattr(ReferenceBackend, "open", spy)
    few = {"training.max_steps": 2, "data.limit": 4, "evaluation.questions": 1, "evaluation.retention_questions": 1}
    for kind in ("lora", "full"):
        settings = {
            "backend": "reference",
            "model.device": "cpu",
            "adapter.kind": kind,
            "judge.control": "always",
            **few,
        }
        folder, _ = fine_tune(load_config(None, environ={}, overrides=settings, profile=None), output=tmp_path / kind)
        compare(*reopen(folder))
        talker(folder, max_new_tokens=1)
        exportable_run(folder, open_backend).open()
    assert found == ["cpu"] * 11


@needs_gpu
def test_gpu_trains_scores_and_answers_as_the_processor_does(bench: Bench, tmp_path: Path) -> None:
    """Ten steps, the loss at rest, logits and greedy answers are those of the processor, within rounding."""
    found: list[Any] = []
    for device in ("cpu", "gpu"):
        session = bench.adapted(device=device)
        losses = [step(session, [Batch(ROWS[:4]), Batch(ROWS[4:])]) for _ in range(10)]
        session.save_logits([ROWS[0].ids], tmp_path / device)
        found.append((losses, session.loss(Batch(ROWS)), session.generate([[3, 4, 5]], 8, [2]), session.device))
    (cpu, cpu_loss, cpu_said, _), (gpu, gpu_loss, gpu_said, name) = found
    assert gpu == pytest.approx(cpu, rel=1e-4)
    assert gpu_loss == pytest.approx(cpu_loss, rel=1e-4)
    assert gpu_said == cpu_said
    assert name.startswith("cuda:0 (")
    logits = [load_file(tmp_path / device)["0"] for device in ("cpu", "gpu")]
    assert torch.allclose(*logits, atol=1e-3)


@needs_gpu
def test_gpu_goes_on_as_if_never_stopped(bench: Bench, tmp_path: Path) -> None:
    """With dropout, a session resumed on the GPU draws and computes what the uninterrupted one does."""
    session = bench.adapted(bench.target(dropout=0.3), device="gpu")
    step(session, [Batch(ROWS)])
    session.save_state(tmp_path)
    wanted = [step(session, [Batch(ROWS)]) for _ in range(3)]
    resumed = bench.adapted(bench.target(dropout=0.3), seed=5, device="gpu")
    resumed.load_state(tmp_path)
    resumed.loss(Batch(ROWS))
    assert [step(resumed, [Batch(ROWS)]) for _ in range(3)] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("small", "wanted", "threads"), [(10**9, None, 1), (1, None, 2), (10**9, "2", 2)])
def test_small_model_computes_in_one_thread(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, small: int, wanted: str | None, threads: int
) -> None:
    """On processors, where nobody has said otherwise; a larger model takes all threads again."""
    before = torch.get_num_threads()
    monkeypatch.setattr("finetune.backends.torch.backend.ONE_THREAD", small)
    monkeypatch.setattr("finetune.backends.torch.backend._THREADS", 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if wanted:
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    try:
        torch.set_num_threads(2)
        open_backend("torch").open(bench.location, "float32", 0, device="cpu")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
