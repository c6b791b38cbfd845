"""Laws of the reference backend's files: what it writes holds it whole, and what it cannot compute it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.backends import open_backend
from finetune.errors import ModelError
from support.damages import changed_settings, damages
from support.tiny_llamas import CONFIG, open_model

MODEL_DAMAGES = damages("model.safetensors", "config.json") | {
    f"{key} {value}": changed_settings("config.json", **{key: value})
    for key, value in [
        ("model_type", "gpt2"),
        ("model_type", "qwen2"),
        ("model_type", "absent"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("quantization_config", {"bits": 4}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}),
        ("rope_parameters", [3]),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("num_hidden_layers", 3),
        ("num_key_value_heads", 2),
        ("num_key_value_heads", 0),
        ("head_dim", 3),
        ("vocab_size", "97"),
        ("rms_norm_eps", float("nan")),
        ("hidden_size", True),
        ("tie_word_embeddings", 1),
        ("hidden_size", "absent"),
    ]
}


@pytest.mark.parametrize("kind", MODEL_DAMAGES)
def test_model_damaged_or_of_another_kind_is_refused(kind: str, tmp_path: Path) -> None:
    """A model whose files are damaged, or that computes something we do not, is refused by its folder's name."""
    open_backend("reference").create(CONFIG, tmp_path, 0)
    MODEL_DAMAGES[kind](tmp_path)
    with pytest.raises(ModelError) as caught:
        open_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("kind", ["F64", "F32", "F16", "BF16"])
def test_model_is_read_from_any_float(kind: str, tmp_path: Path) -> None:
    """Weights stored in two, four or eight bytes become the very same numbers in float64; shards are read together."""
    open_backend("reference").create(CONFIG, tmp_path, 0)
    path, names = tmp_path / "model.safetensors", {}
    for number, (name, weight) in enumerate(load_file(path).items()):
        coarse = (weight.view(np.uint32) & 0xFFFF0000).view(np.float32) * np.float32(1)
        raw = {"F64": coarse.astype("<f8"), "F32": coarse, "F16": coarse.astype("<f2")}.get(kind)
        bits = raw if raw is not None else (coarse.view(np.uint32) >> 16).astype("<u2")
        header = json.dumps({name: {"dtype": kind, "shape": bits.shape, "data_offsets": [0, bits.nbytes]}}).encode()
        header += b" " * (-len(header) % 8)
        names[name] = f"model-{number}.safetensors"
        (tmp_path / names[name]).write_bytes(len(header).to_bytes(8, "little") + header + bits.tobytes())
        names[name, "value"] = (raw if raw is not None else coarse).astype(np.float64)
    path.unlink()  # two sets of weights are one too many
    index = {name: file for name, file in names.items() if isinstance(name, str)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    weights = open_model(tmp_path).weights
    assert len(weights) == 2 * 9 + 3
    assert all(np.array_equal(weights[name], names[name, "value"]) for name in weights)
