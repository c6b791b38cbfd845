"""Laws of MLX and model files: every weight from the files, every setting minded, what is saved is what was."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.backends import open_backend
from finetune.errors import ModelError
from finetune.records import ModelLocation
from support.damages import changed_settings, damaged_tensors, damages
from support.sessions import CONFIGS, CONTEXT, IDS, Bench, all_logits, make_model, need, put, weights

need("mlx")
pytestmark = pytest.mark.tier2
SHARED_DAMAGES = damages("model.safetensors", "config.json") | {
    "quantised": changed_settings("config.json", quantization={"bits": 4, "group_size": 32}),
    "unknown": changed_settings("config.json", model_type="nonsense"),
    "of no kind": changed_settings("config.json", model_type="absent"),
    "not a module": changed_settings("config.json", model_type="..utils"),
    "helper": changed_settings("config.json", model_type="rope_utils"),
}
MODEL_DAMAGES = {
    "llama": SHARED_DAMAGES
    | {
        f"{key} {value}": changed_settings("config.json", **{key: value})
        for key, value in [
            ("hidden_act", "gelu"),
            ("num_hidden_layers", 3),
            ("num_key_value_heads", 3),
            ("hidden_size", 24),
            ("attention_bias", True),
            ("rope_parameters", {"rope_type": "nonsense", "rope_theta": 1e4}),
            ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            ("rope_parameters", {"full_attention": {"rope_theta": 9.0}, "other": {"rope_theta": 8.0}}),
            ("num_attention_heads", "absent"),
        ]
    },
    "gpt2": SHARED_DAMAGES
    | {
        f"{key} {value}": changed_settings("config.json", **{key: value})
        for key, value in [
            ("activation_function", "relu"),
            ("scale_attn_by_inverse_layer_idx", True),
            ("n_inner", 13),
            ("tie_word_embeddings", False),
            ("n_layer", 1),
            ("n_positions", 39),
        ]
    },
}


@pytest.mark.parametrize(
    ("family", "kind"), [(family, kind) for family in MODEL_DAMAGES for kind in MODEL_DAMAGES[family]]
)
def test_model_damaged_or_computed_otherwise_is_refused(family: str, kind: str, tmp_path: Path) -> None:
    """A model whose files are damaged, or that mlx-lm would compute otherwise, is refused by its folder's name."""
    bench = make_model(f"mlx-{family}", tmp_path)
    MODEL_DAMAGES[family][kind](tmp_path)
    if (family, kind) == ("gpt2", "n_inner 13"):  # mlx-lm reads no such setting: the weights themselves must tell
        path = tmp_path / "model.safetensors"
        tensors = load_file(path)
        tensors["transformer.h.1.mlp.c_fc.weight"] = tensors["transformer.h.1.mlp.c_fc.weight"][:, :13].copy()
        save_file(tensors, path)
    with pytest.raises(ModelError) as caught:
        bench.open()
    assert str(tmp_path) in str(caught.value)


def test_unknown_architecture_is_told_what_mlx_lm_knows(tmp_path: Path) -> None:
    """The refusal names the nearest architectures; nothing of another kind of file is among them."""
    bench = make_model("mlx-llama", tmp_path)
    changed_settings("config.json", model_type="quen2")(tmp_path)
    with pytest.raises(ModelError, match="mlx-lm does not know") as caught:
        bench.open()
    assert "qwen2" in caught.value.hint
    with pytest.raises(ModelError, match="float16"):
        bench.open(dtype="float16")


def test_head_left_unsaid_is_tied_when_the_files_hold_none(tmp_path: Path) -> None:
    """Whether the head is tied is read off the files where the config is silent; a tied head saved twice is one."""
    free = make_model("mlx-llama", tmp_path / "free")
    wanted = all_logits(free.open())
    changed_settings("config.json", tie_word_embeddings="absent")(free.location.folder)
    assert np.array_equal(all_logits(free.open()), wanted)
    tied = make_model("mlx-llama", tmp_path / "tied", tie_word_embeddings=True)
    wanted = all_logits(tied.open())
    changed_settings("config.json", tie_word_embeddings="absent")(tied.location.folder)
    assert np.array_equal(all_logits(tied.open()), wanted)
    changed_settings("config.json", tie_word_embeddings=True)(tied.location.folder)
    table = "model.embed_tokens.weight"
    damaged_tensors("model.safetensors", lambda each: each.update({"lm_head.weight": each[table]}))(
        tied.location.folder
    )
    assert np.array_equal(all_logits(tied.open()), wanted)


def test_gpt2_is_read_as_the_hub_has_it(tmp_path: Path) -> None:
    """Old files name GPT-2's weights without `transformer.` and carry masks; they are the same model."""
    bench = make_model("mlx-gpt2", tmp_path)
    wanted = bench.open().fingerprints()

    def age(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, CONTEXT, CONTEXT), np.float32)
        tensors["h.1.attn.masked_bias"] = np.float32(-1e4).reshape(())

    damaged_tensors("model.safetensors", age)(tmp_path)
    assert bench.open().fingerprints() == wanted


def test_model_is_made_as_the_seed_and_the_config_say(tmp_path: Path) -> None:
    """One seed makes one file, another seed another; the reference backend opens it: names and shapes are the same."""
    files = []
    for number, seed in enumerate((0, 0, 7)):
        (tmp_path / str(number)).mkdir()
        config = {**IDS, **CONFIGS["llama"], "initializer_range": 0.25}
        open_backend("mlx").create(config, tmp_path / str(number), seed)
        files.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]
    bench = Bench("mlx", ModelLocation("llama", tmp_path / "0", "local"))
    ours, theirs = bench.open(), bench.at(tmp_path / "0", "reference").open()
    assert ours.fingerprints().keys() == theirs.fingerprints().keys()
    values = {name: np.array(tensor) for name, tensor in ours._tensors().items()}
    assert all(np.array_equal(values[name], weight) for name, weight in theirs.weights.items())  # type: ignore[attr-defined]
    assert values["model.layers.1.mlp.up_proj.weight"].std() == pytest.approx(0.25, rel=0.1)
    assert not values["model.embed_tokens.weight"][0].any()
    assert (values["model.norm.weight"] == 1).all()
    with pytest.raises(ModelError, match="does not know"):
        open_backend("mlx").create({**config, "model_type": "nonsense"}, tmp_path / "0", 0)


def test_weights_that_mlx_lm_keeps_otherwise_are_not_adapted(tmp_path: Path) -> None:
    """Where mlx-lm's names are not the files', an adapter would fit nothing else: it is refused, as saving is."""
    bench = make_model("mlx-llama", tmp_path / "model")
    session = bench.open()
    names = session.loaded.names
    session.loaded = replace(session.loaded, names=replace(names, filed=names.filed - {"model.norm.weight"}))
    session.attach(bench.target(), 0)
    with pytest.raises(ModelError, match=r"another form than its files, first model\.norm\.weight"):
        session.save_model(tmp_path)
    filed = names.filed - {"model.layers.0.self_attn.q_proj.weight"}
    session.loaded = replace(session.loaded, names=replace(names, filed=filed))
    with pytest.raises(ModelError, match=r"an adapter for them would fit nothing else"):
        session.attach(bench.target(), 0)


def test_copy_of_the_weights_stays_when_the_files_go(tmp_path: Path) -> None:
    """A session needs its model's files no longer, nor a state its checkpoint's."""
    bench = make_model("mlx-llama", tmp_path / "model")
    session = bench.trained()
    (tmp_path / "state").mkdir()
    session.save_state(tmp_path / "state")
    again = bench.adapted(seed=3)
    again.load_state(tmp_path / "state")
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "state")
    assert np.array_equal(all_logits(again), all_logits(session))
    put(again, {name: value * 0 for name, value in weights(again).items()})
    assert np.abs(all_logits(again) - all_logits(session)).max() > 0.01
