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
from support.tiny_mlx import (
    IDS,
    adapted,
    equal,
    furthest,
    logits_of,
    make_model,
    open_session,
    set_weights,
    shake,
    weights,
)
from support.tiny_models import (
    CONFIGS,
    CONTEXT,
    target_of,
    train_a_little,
)

pytestmark = pytest.mark.tier2
KINDS = ("llama", "gpt2")
PROMPTS = [[5, 6, 7], [8, 9], [3, 4, 5], [10], [11, 12, 13, 14, 15, 16, 17], [9, 8]]


@pytest.fixture(scope="module", params=KINDS)
def location(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelLocation:
    """Each kind of model."""
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


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


@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family in KINDS for kind in MODEL_DAMAGES[family]])
def test_model_damaged_or_computed_otherwise_is_refused(family: str, kind: str, tmp_path: Path) -> None:
    """A model whose files are damaged, or that mlx-lm would compute otherwise, is refused by its folder's name."""
    assert [len(MODEL_DAMAGES[each]) for each in KINDS] == [26, 23]
    location = make_model(family, tmp_path)
    MODEL_DAMAGES[family][kind](tmp_path)
    if (family, kind) == ("gpt2", "n_inner 13"):  # mlx-lm reads no such setting: the weights themselves must tell
        path = tmp_path / "model.safetensors"
        tensors = load_file(path)
        tensors["transformer.h.1.mlp.c_fc.weight"] = tensors["transformer.h.1.mlp.c_fc.weight"][:, :13].copy()
        save_file(tensors, path)
    with pytest.raises(ModelError) as caught:
        open_session(location)
    assert str(tmp_path) in str(caught.value)


def test_unknown_architecture_is_told_what_mlx_lm_knows(tmp_path: Path) -> None:
    """The refusal names the nearest architectures; nothing of another kind of file is among them."""
    location = make_model("llama", tmp_path)
    changed_settings("config.json", model_type="quen2")(tmp_path)
    with pytest.raises(ModelError, match="mlx-lm does not know") as caught:
        open_session(location)
    assert "qwen2" in caught.value.hint
    with pytest.raises(ModelError, match="float16"):
        open_session(location, dtype="float16")


def test_rope_is_read_wherever_the_config_keeps_it(tmp_path: Path) -> None:
    """RoPE's base counts the same at the top of the config and in `rope_parameters`; another base, other logits."""
    location = make_model("llama", tmp_path)
    found = []
    for change in (
        {"rope_theta": 30.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 30.0}},
        {"rope_parameters": {"rope_theta": 30.0}, "rope_theta": 5.0},
        {"rope_theta": 10000.0},
        {},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 30.0}},
    ):
        changed_settings("config.json", **{"rope_theta": "absent", "rope_parameters": "absent", **change})(tmp_path)
        found.append(logits_of(open_session(location), PROMPTS))
    assert equal(found[0], found[1])
    assert equal(found[0], found[2])
    assert equal(found[3], found[4])
    assert furthest(found[0], found[3]) > 0.01
    assert furthest(found[0], found[5]) > 0.01


def test_head_left_unsaid_is_tied_when_the_files_hold_none(tmp_path: Path) -> None:
    """Whether the head is tied is read off the files where the config is silent; a tied head saved twice is one."""
    free = make_model("llama", tmp_path / "free")
    wanted = logits_of(open_session(free), PROMPTS)
    changed_settings("config.json", tie_word_embeddings="absent")(free.folder)
    assert equal(logits_of(open_session(free), PROMPTS), wanted)
    tied = make_model("llama", tmp_path / "tied", tie_word_embeddings=True)
    wanted = logits_of(open_session(tied), PROMPTS)
    changed_settings("config.json", tie_word_embeddings="absent")(tied.folder)
    assert equal(logits_of(open_session(tied), PROMPTS), wanted)
    changed_settings("config.json", tie_word_embeddings=True)(tied.folder)
    table = "model.embed_tokens.weight"
    damaged_tensors("model.safetensors", lambda each: each.update({"lm_head.weight": each[table]}))(tied.folder)
    assert equal(logits_of(open_session(tied), PROMPTS), wanted)


def test_gpt2_is_read_as_the_hub_has_it(tmp_path: Path) -> None:
    """Old files name GPT-2's weights without `transformer.` and carry masks; they are the same model."""
    location = make_model("gpt2", tmp_path)
    wanted = open_session(location).fingerprints()

    def age(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, CONTEXT, CONTEXT), np.float32)
        tensors["h.1.attn.masked_bias"] = np.float32(-1e4).reshape(())

    damaged_tensors("model.safetensors", age)(tmp_path)
    assert open_session(location).fingerprints() == wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_saved_whole_is_the_same_model(location: ModelLocation, dtype: str, tmp_path: Path) -> None:
    """A fully trained model saved and opened again is the same to the bit."""
    session = open_session(location, dtype=dtype)
    session.attach(None, 0)
    session._put({name: (value * 1.5 + 0.01).astype(value.dtype) for name, value in session._trainable().items()})
    session.save_model(tmp_path)
    again = open_session(ModelLocation(location.name, tmp_path, "local"), dtype=dtype)
    assert again.fingerprints() == session.fingerprints()
    assert again.fingerprints() != open_session(location, dtype=dtype).fingerprints()
    assert equal(logits_of(again, PROMPTS), logits_of(session, PROMPTS))


def test_merged_from_disk_is_adapted(location: ModelLocation, tmp_path: Path) -> None:
    """P-MERGE: saved whole the adapter is folded into the weights: the same logits, which are not the base's."""
    session = adapted(location)
    shake(session)
    tuned = logits_of(session, PROMPTS)
    session.save_model(tmp_path)
    merged = open_session(ModelLocation(location.name, tmp_path, "local"))
    assert merged.fingerprints().keys() == open_session(location).fingerprints().keys()
    assert furthest(logits_of(merged, PROMPTS), tuned) < 1e-4
    assert furthest(logits_of(merged, PROMPTS), logits_of(open_session(location), PROMPTS)) > 0.1
    assert equal(logits_of(session, PROMPTS), tuned)


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
    location = ModelLocation("llama", tmp_path / "0", "local")
    ours, theirs = open_session(location), open_backend("reference").open(location, "float32", 0)
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
    session = open_session(make_model("llama", tmp_path / "model"))
    names = session.loaded.names
    session.loaded = replace(session.loaded, names=replace(names, filed=names.filed - {"model.norm.weight"}))
    session.attach(target_of("llama"), 0)
    with pytest.raises(ModelError, match=r"another form than its files, first model\.norm\.weight"):
        session.save_model(tmp_path)
    filed = names.filed - {"model.layers.0.self_attn.q_proj.weight"}
    session.loaded = replace(session.loaded, names=replace(names, filed=filed))
    with pytest.raises(ModelError, match=r"an adapter for them would fit nothing else"):
        session.attach(target_of("llama"), 0)


def test_copy_of_the_weights_stays_when_the_files_go(tmp_path: Path) -> None:
    """A session needs its model's files no longer, nor a state its checkpoint's."""
    location = make_model("llama", tmp_path / "model")
    session = adapted(location)
    train_a_little(session)
    (tmp_path / "state").mkdir()
    session.save_state(tmp_path / "state")
    again = adapted(location, seed=3)
    again.load_state(tmp_path / "state")
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "state")
    assert equal(logits_of(again, PROMPTS), logits_of(session, PROMPTS))
    set_weights(again, {name: value * 0 for name, value in weights(again).items()})
    assert furthest(logits_of(again, PROMPTS), logits_of(session, PROMPTS)) > 0.01
