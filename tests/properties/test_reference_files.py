"""Laws of the reference backend's files: what it writes holds it whole, and what it cannot compute it refuses."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.backends import open_backend
from finetune.errors import EvidenceError, ModelError, RefusedError
from finetune.evidence.reload import check_reload
from finetune.records import AdapterTarget, Optimization
from support.damages import changed_bytes, changed_settings, damaged_tensors, damages
from support.tiny_llamas import CONFIG, DROPPING, LINEAR, ROWS, adapted, open_model, step, tiny

WEIGHTS = "adapter_model.safetensors"


ADAPTER_DAMAGES = damages(WEIGHTS, "adapter_config.json") | {
    f"{key} {value}": changed_settings("adapter_config.json", **{key: value})
    for key, value in [
        ("use_dora", True),
        ("use_rslora", "yes"),
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 2}),
        ("r", 2),
        ("r", True),
        ("r", "absent"),
        ("lora_alpha", "7"),
        ("lora_dropout", 1.0),
        ("peft_type", "IA3"),
        ("target_modules", "all-linear"),
        ("target_modules", ["q_prj"]),
        ("target_modules", "absent"),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("a_new_kind", 3),
        ("fan_in_fan_out", True),
        ("layers_to_transform", [1]),
        ("alpha_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"(": 3.0}),
        ("rank_pattern", ["q_proj"]),
        ("modules_to_save", "norm"),
        ("modules_to_save", ["norm"]),
    ]
}
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


@pytest.mark.parametrize("kind", ADAPTER_DAMAGES)
def test_adapter_damaged_is_refused(kind: str, tmp_path: Path) -> None:
    """An adapter whose files are damaged, or of a kind that is not known, is refused and the model stays as it was."""
    adapted(trained=True).save_adapter(tmp_path)
    ADAPTER_DAMAGES[kind](tmp_path)
    session = tiny()
    before = session.fingerprints()
    with pytest.raises(ModelError, match="adapter"):
        session.load_adapter(tmp_path)
    assert session.fingerprints() == before


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


STATE_DAMAGES = {
    "dropped": damaged_tensors("state.safetensors", lambda tensors: tensors.pop(max(tensors))),
    "added": damaged_tensors("state.safetensors", lambda tensors: tensors.update({"weight/more": np.zeros(3)})),
    "turned": damaged_tensors(
        "state.safetensors", lambda tensors: tensors.update({min(tensors): tensors[min(tensors)].T})
    ),
    "cut off": changed_bytes("state.safetensors", lambda content: content[:-3]),
    "cut off too": changed_bytes("state.json", lambda content: content[:-30]),
    "no random state": changed_settings("state.json", random="absent"),
    "another random state": changed_settings("state.json", random={"bit_generator": "MT19937"}),
}


@pytest.mark.parametrize("kind", STATE_DAMAGES)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    """A state with something missing, unknown or of another shape is refused, and the run goes on as if never asked."""
    saved, session, same = adapted(DROPPING), adapted(DROPPING), adapted(DROPPING)
    step(saved)
    saved.save_state(tmp_path)
    STATE_DAMAGES[kind](tmp_path)
    with pytest.raises(RefusedError, match="checkpoint"):
        session.load_state(tmp_path)
    assert step(session) == step(same)
    assert session.fingerprints() == same.fingerprints()


def test_fresh_process_finds_the_same_logits_without_any_framework(tmp_path: Path) -> None:
    """A fresh process finds the same logits, not the base's, and says when it cannot; no ML framework is loaded."""
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    model.mkdir(), adapter.mkdir()
    open_backend("reference").create(CONFIG, model, 0)
    session = open_model(model)
    session.attach(AdapterTarget(3, 7.0, 0.0, LINEAR), 0)
    session.prepare_updates(Optimization(0.0, 1.0))
    step(session)
    session.save_adapter(adapter)
    asked: Sequence[Sequence[int]] = [row.ids for row in ROWS]
    found = check_reload("reference", session, session.location, adapter, prompts=asked, dtype="float32")
    assert found.prompts == 7
    assert found.difference <= 1e-5 < 1e-3 < found.difference_from_base
    shutil.rmtree(adapter)
    with pytest.raises(EvidenceError, match="adapter"):
        check_reload("reference", session, session.location, adapter, prompts=asked, dtype="float32")
    code = "import sys, finetune.backends.reference.reload; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not set(done.stdout.split()) & {"torch", "transformers", "peft", "mlx", "ml_dtypes", "jax"}
