"""Laws of mlx-lm's adapter format: not a bit is lost on the way there and back, and mlx-lm itself reads it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import ModelError
from finetune_strategies.profiles import examples
from support.damages import SETTINGS, changed_settings, damaged_tensors, damages
from support.sessions import Bench, all_logits, make_model, need, shake

need("mlx")
from mlx_lm.tuner.utils import load_adapters  # noqa: E402

from finetune.backends.mlx.adapter import write_mlx_adapter  # noqa: E402

pytestmark = pytest.mark.tier2


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Each kind of model."""
    return make_model(f"mlx-{request.param}", tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def trained(bench: Bench) -> Any:
    """A session whose adapter has been trained a little."""
    return bench.trained()


@given(st.sampled_from([7.0, 0.3, 16.0, 1 / 3, 11.5]), st.integers(1, 5), st.booleans())
@examples(1 / 6)
def test_adapter_travels_through_mlx_lms_format(
    bench: Bench, tmp_path_factory: pytest.TempPathFactory, alpha: float, rank: int, whole_path: bool
) -> None:
    """To mlx-lm's format and back to PEFT's: not a bit is lost; mlx-lm's own loader gives the same logits."""
    deep = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}[bench.kind]
    changes = {"modules": (deep,)} if whole_path else {}
    session = bench.adapted(bench.target(rank=rank, alpha=alpha, dropout=0.1, **changes))
    shake(session)
    folder = tmp_path_factory.mktemp("mlx")
    write_mlx_adapter(session.adapter, str(bench.location.folder), len(session.loaded.model.layers), folder)
    again = bench.open()
    again.load_adapter(folder)
    assert np.array_equal(all_logits(again), all_logits(session))
    assert again.fingerprints() == session.fingerprints()
    assert (again.adapter.target.alpha, again.adapter.target.rank) == (alpha, rank)
    plain = bench.open()
    load_adapters(plain.loaded.model, str(folder)).eval()
    assert np.abs(all_logits(plain) - all_logits(session)).max() < 1e-4
    assert np.abs(all_logits(plain) - all_logits(bench.open())).max() > 1e-3


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
def test_mlx_lm_adapter_damaged_is_refused(bench: Bench, trained: Any, kind: str, tmp_path: Path) -> None:
    """An adapter in mlx-lm's format that is damaged, or is no plain LoRA, is refused."""
    write_mlx_adapter(trained.adapter, "base", 2, tmp_path)
    MLX_DAMAGES[kind](tmp_path)
    with pytest.raises(ModelError, match="adapter"):
        bench.open().load_adapter(tmp_path)


def test_adapter_that_mlx_lms_format_has_no_place_for_is_refused(bench: Bench, tmp_path: Path) -> None:
    """mlx-lm's format knows one rank and one scale; DoRA and rsLoRA fit into it, and mlx-lm loads them."""
    for kind in ("lora", "saved", "ia3"):
        with pytest.raises(ModelError, match="no place for"):
            write_mlx_adapter(bench.trained(bench.kinds()[kind]).adapter, "base", 2, tmp_path)
    session = bench.trained(bench.target(kind="dora", scaling="rank_stabilized"))
    write_mlx_adapter(session.adapter, "base", 2, tmp_path)
    alone, again = bench.open(), bench.open()
    load_adapters(alone.loaded.model, str(tmp_path)).eval()
    again.load_adapter(tmp_path)
    assert np.abs(all_logits(alone) - all_logits(session)).max() < 1e-4
    assert np.array_equal(all_logits(again), all_logits(session))
