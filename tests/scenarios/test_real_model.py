"""Tier 2: real models are really trained, and the five criteria are judged on what was measured."""

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from finetune.config import load_config
from finetune.errors import ModelError
from finetune.models.locate import SHIPPED, locate_model
from finetune.processes import available_memory
from support.recorded_scores import record_scores

pytestmark = [
    pytest.mark.tier2,
    pytest.mark.skipif(
        os.environ.get("FT_REAL_MODEL_ENABLE") != "1",
        reason="trains real models for minutes: enable with FT_REAL_MODEL_ENABLE=1 make test-e2e-real-model",
    ),
]
pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")

CHOSEN = os.environ.get("FT_TEST_MODEL")
CRITERIA = 5
HUB_MODELS = ((16, "microsoft/DialoGPT-small", 4), (8, "distilgpt2", 2))
"""The strategy's resource scaling: above so many GiB of free memory, a model and the rows it trains on at once."""
Recorder = Callable[[str, object], None]
WITH_MLX = pytest.param(
    "mlx",
    marks=pytest.mark.skipif(
        find_spec("mlx_lm") is None, reason="needs the mlx extra: pip install 'finetune-suite[mlx]'"
    ),
)
SIZES: dict[str, dict[str, Any]] = {
    "torch": {},
    # MLX keeps more for the way back: of 4 rows it holds 28% less with LoRA (Llama) and 22% (GPT-2), of 2 rows 41
    # and 32%. The verdict says at which sizes it was measured.
    "mlx": {"judge.memory_batch_size": 2},
}
"""What a backend's criteria are judged at, where it is not the default."""


def train_on_facts(model: str, output: Path, **settings: Any) -> dict[str, Any]:
    """Fine-tune `model` on the shipped facts and return its run record."""
    from finetune.report.progress import Progress
    from finetune.train import fine_tune

    loaded = load_config(None, environ={}, overrides={"model.path": model, **settings}, profile="demo")
    with Progress() as progress:
        listener = progress if os.environ.get("FT_VERBOSE") == "1" else lambda event: None
        return fine_tune(loaded, output=output, listener=listener)[1]


def literal_outcomes(run: dict[str, Any]) -> dict[int, str]:
    """The outcome of each of the five criteria as the strategy words them."""
    return {verdict["criterion"]: verdict["outcome"] for verdict in run["verdicts"] if not verdict["companion"]}


def not_holding(run: dict[str, Any]) -> list[str]:
    """What failed or is inconclusive, with its measured value: empty for a healthy run."""
    return [
        f"{verdict['title']}: {verdict['outcome']}, measured {verdict['measured']}, allowed {verdict['allowed']}"
        for verdict in run["verdicts"]
        if verdict["outcome"] in ("failed", "inconclusive")
    ]


of_shipped_models = pytest.mark.skipif(
    CHOSEN is not None, reason=f"FT_TEST_MODEL={CHOSEN} is judged instead: unset it for the shipped models"
)


@of_shipped_models
@pytest.mark.parametrize("backend", ["torch", WITH_MLX])
@pytest.mark.parametrize("model", SHIPPED)
def test_shipped_model_meets_all_criteria(model: str, backend: str, tmp_path: Path, record_property: Recorder) -> None:
    """A shipped model learns the new facts and only those, keeps the old ones, and everything is measured."""
    run = train_on_facts(model, tmp_path / "run", backend=backend, **SIZES[backend])
    record_scores(record_property, run, backend=backend)
    assert literal_outcomes(run) == dict.fromkeys(range(1, CRITERIA + 1), "passed")
    assert not_holding(run) == []
    learning, retention = run["scores"]["learning"], run["scores"]["retention"]
    shares = {name: learning[name]["right"] / learning[name]["count"] for name in ("base", "tuned", "control")}
    assert shares["base"] <= 0.2
    assert shares["tuned"] >= 0.9
    assert shares["control"] <= 0.2
    assert retention["base"]["right"] - retention["tuned"]["right"] <= 0.1 * retention["base"]["count"]
    assert learning["base"]["count"] >= 48
    assert retention["base"]["count"] >= 36


@of_shipped_models
def test_same_seed_gives_the_same_adapter_bytes(tmp_path: Path) -> None:
    """Two runs with one seed write byte-identical adapters, and another seed writes another."""
    quick = {"training.max_steps": 12, "judge.control": "never", "judge.memory": "never"}
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        train_on_facts("reference-llama", tmp_path / name, **quick, **{"training.seed": seed})
    first, second, other = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("first", "second", "other")
    )
    assert first == second
    assert first != other


@pytest.fixture
def every_processor() -> Iterator[None]:
    """A model of the hub is large enough for all of them, also where the shipped ones have a thread each."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or before)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("every_processor")
def test_hub_model_meets_all_criteria(tmp_path: Path, record_property: Recorder) -> None:
    """A model from the hub, chosen by FT_TEST_MODEL or by free memory, meets the five criteria too."""
    free = available_memory()
    model, rows = next(((name, rows) for least, name, rows in HUB_MODELS if free > least * 2**30), ("", None))
    model = CHOSEN or model
    if not model:
        pytest.skip(f"{free / 1e9:.1f} GB are free and a hub model needs 8: free some memory")
    try:
        locate_model(model)
    except ModelError as error:
        pytest.skip(f"{error.message}; with a hub or a local copy it would be judged too")
    gentle = {"training.learning_rate": 1e-3, "training.weight_decay": 0.0, "judge.memory": "always"}
    batch = {"training.batch_size": rows} if rows else {}
    chosen = {} if model in SHIPPED else gentle
    run = train_on_facts(model, tmp_path / "run", **chosen, **batch)
    record_scores(record_property, run, backend="torch")
    assert literal_outcomes(run) == dict.fromkeys(range(1, CRITERIA + 1), "passed"), not_holding(run)
