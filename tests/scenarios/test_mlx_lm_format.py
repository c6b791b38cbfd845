"""Laws of mlx-lm's adapter format: not a bit is lost on the way there and back, and mlx-lm itself reads it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import ModelError
from finetune.records import AdapterTarget, ModelLocation
from finetune_strategies.profiles import examples
from support.damages import changed_settings, damaged_tensors, damages
from support.tiny_mlx import adapted, equal, furthest, logits_of, make_model, open_session, shake
from support.tiny_models import target_of, train_a_little

pytestmark = pytest.mark.tier2
KINDS = ("llama", "gpt2")
SETTINGS = "adapter_config.json"
PROMPTS = [[5, 6, 7], [8, 9], [3, 4, 5], [10], [11, 12, 13, 14, 15, 16, 17], [9, 8]]


@pytest.fixture(scope="module", params=KINDS)
def location(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelLocation:
    """Each kind of model."""
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def trained(location: ModelLocation) -> Any:
    """A session whose adapter has been trained a little."""
    session = adapted(location)
    train_a_little(session)
    return session


@given(st.sampled_from([7.0, 0.3, 16.0, 1 / 3, 11.5]), st.integers(1, 5), st.booleans())
@examples(1 / 6)
def test_adapter_travels_through_mlx_lms_format(
    location: ModelLocation, tmp_path_factory: pytest.TempPathFactory, alpha: float, rank: int, whole_path: bool
) -> None:
    """To mlx-lm's format and back to PEFT's: not a bit is lost; mlx-lm's own loader gives the same logits."""
    from mlx_lm.tuner.utils import load_adapters

    from finetune.backends.mlx.adapter import write_mlx_adapter

    deep = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}[location.name]
    modules = (deep,) if whole_path else target_of(location.name).modules
    session = adapted(location, target=AdapterTarget(rank, alpha, 0.1, modules))
    shake(session)
    folder = tmp_path_factory.mktemp("mlx")
    write_mlx_adapter(session.adapter, str(location.folder), len(session.loaded.model.layers), folder)
    again = open_session(location)
    again.load_adapter(folder)
    assert equal(logits_of(again, PROMPTS), logits_of(session, PROMPTS))
    assert again.fingerprints() == session.fingerprints()
    assert (again.adapter.target.alpha, again.adapter.target.rank) == (alpha, rank)
    plain = open_session(location)
    load_adapters(plain.loaded.model, str(folder)).eval()
    assert furthest(logits_of(plain, PROMPTS), logits_of(session, PROMPTS)) < 1e-4
    assert furthest(logits_of(plain, PROMPTS), logits_of(open_session(location), PROMPTS)) > 1e-3


MLX_DAMAGES = damages("adapters.safetensors", SETTINGS) | {
    "dora without magnitudes": changed_settings(SETTINGS, fine_tune_type="dora"),
    "full": changed_settings(SETTINGS, fine_tune_type="full"),
    "no parameters": changed_settings(SETTINGS, lora_parameters="absent"),
    "no scale": changed_settings(SETTINGS, lora_parameters={"rank": 3}),
    "other rank": changed_settings(SETTINGS, lora_parameters={"rank": 2, "scale": 1.0}),
    "rank 0": changed_settings(SETTINGS, lora_parameters={"rank": 0, "scale": 1.0}),
    "words": changed_settings(SETTINGS, lora_parameters={"rank": 3, "scale": "2"}),
    "magnitudes": damaged_tensors(
        "adapters.safetensors", lambda each: each.update({f"{min(each)[:-7]}.m": np.ones(9, "f4")})
    ),
}


@pytest.mark.parametrize("kind", [kind for kind in MLX_DAMAGES if kind != "missing"])
def test_mlx_lm_adapter_damaged_is_refused(location: ModelLocation, trained: Any, kind: str, tmp_path: Path) -> None:
    """An adapter in mlx-lm's format that is damaged, or is no plain LoRA, is refused."""
    from finetune.backends.mlx.adapter import write_mlx_adapter

    assert len(MLX_DAMAGES) == 20
    write_mlx_adapter(trained.adapter, "base", 2, tmp_path)
    MLX_DAMAGES[kind](tmp_path)
    with pytest.raises(ModelError, match="adapter"):
        open_session(location).load_adapter(tmp_path)
