"""Laws of the models room: what is no whole, honest model is refused by name before a weight is loaded."""

import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from finetune.adapters.choose import check_rank, choose_layers
from finetune.errors import ModelError
from finetune.models.locate import SHIPPED, SHIPPED_FOLDER, locate_model
from finetune.models.shape import read_shape, read_tensor_shapes, weight_files
from finetune.records import AdapterTarget, LinearLayer, ModelShape
from finetune_strategies.profiles import examples
from finetune_strategies.scratch import empty_folder

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
}
LAYERS = {"self_attn.q_proj": (6, 6), "self_attn.k_proj": (2, 6), "mlp.up_proj": (10, 6), "mlp.down_proj": (6, 10)}


def tensors() -> dict[str, np.ndarray]:
    """The weights of a Llama of two layers: tables, norms and four linear layers each."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (11, 6), "lm_head.weight": (11, 6)}
    shapes["model.norm.weight"] = (6,)
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LAYERS.items()}
        shapes |= {f"model.layers.{layer}.input_layernorm.weight": (6,), f"model.layers.{layer}.q_proj.bias": (6,)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def write_model(folder: Path, *, config: Any = CONFIG, shards: int = 1) -> Path:
    """A model folder with one weights file, or with several and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = tensors()
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names = {tensor: f"model-{number % shards}.safetensors" for number, tensor in enumerate(weights)}
    for file in set(names.values()):
        save_file({name: weights[name] for name in weights if names[name] == file}, folder / file)
    write_index(folder, names)
    return folder


def write_index(folder: Path, names: Any) -> None:
    """The index that says which file holds which tensor."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")


@contextmanager
def model(**how: Any) -> Iterator[Path]:
    """A model folder that goes away again."""
    with empty_folder() as folder:
        yield write_model(folder / "model", **how)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub can be reached, as on a plane."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shape_is_what_the_files_hold(shards: int, tmp_path: Path) -> None:
    """Sizes come from the config, parameters and linear layers from the weights, however many files hold them."""
    shape = read_shape(write_model(tmp_path, shards=shards))
    assert shape.parameters == sum(array.size for array in tensors().values())
    expected = {f"model.layers.{layer}.{name}": size for layer in range(2) for name, size in LAYERS.items()}
    assert {layer.name: layer.shape for layer in shape.linear_layers} == expected
    assert (shape.architecture, shape.vocab_size, shape.hidden_size) == ("LlamaForCausalLM", 11, 6)
    assert (shape.layers, shape.context_length) == (2, 32)
    assert read_tensor_shapes(tmp_path) == {name: array.shape for name, array in tensors().items()}


def test_shape_reads_other_families_names(tmp_path: Path) -> None:
    """GPT-2's names for the same sizes, and sizes nested under text_config, are read."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 7, "n_embd": 5, "n_layer": 3, "n_positions": 9}
    nested = {"model_type": "vlm", "text_config": gpt2}
    for number, config in enumerate((gpt2, nested)):
        shape = read_shape(write_model(tmp_path / str(number), config=config))
        assert (shape.vocab_size, shape.hidden_size, shape.layers, shape.context_length) == (7, 5, 3, 9)
        assert shape.architecture == config["model_type"]


SIZES = ("heads", "kv_heads", "head_dim", "intermediate_size", "tied_head", "attention_dropout", "hidden_dropout")
SAID = {
    "llama": (
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 5, "intermediate_size": 10},
        (6, 2, 5, 10, False, 0.0, 0.0),
    ),
    "a head as wide as its share, each with a key head of its own": (
        {"num_attention_heads": 3, "intermediate_size": 10, "attention_dropout": 0.2},
        (3, 3, 2, 10, False, 0.2, 0.0),
    ),
    "gpt2, four times as wide inside": (
        {"n_embd": 6, "n_head": 2, "n_inner": None, "attn_pdrop": 0.1, "resid_pdrop": 0.3},
        (2, 2, 3, 24, False, 0.1, 0.3),
    ),
    "tied": ({"tie_word_embeddings": True, "n_inner": 7}, (0, 0, 0, 7, True, 0.0, 0.0)),
    "nested": ({"text_config": {"n_head": 2, "hidden_size": 8}}, (2, 2, 4, 32, False, 0.0, 0.0)),
    "odd": (
        {"num_attention_heads": -1, "attention_dropout": "much", "attn_pdrop": 10**200, "tie_word_embeddings": "no"},
        (0, 0, 0, 24, False, 0.0, 0.0),
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_shape_reads_what_memory_depends_on(case: str, tmp_path: Path) -> None:
    """Heads, inner size, tied tables and dropouts are read under each family's names, or follow from the others."""
    config, expected = SAID[case]
    nested = "text_config" in config or "n_embd" in config
    shape = read_shape(write_model(tmp_path, config=config if nested else {**CONFIG, **config}))
    assert tuple(getattr(shape, name) for name in SIZES) == expected


def test_shape_counts_each_number_once(tmp_path: Path) -> None:
    """A tied head that was saved twice, and the masks and frequencies of old files, are no weights of their own."""
    plain = read_shape(write_model(tmp_path / "plain"))
    weights = tensors() | {
        "model.layers.0.attn.bias": np.zeros((1, 1, 32, 32), np.float32),
        "model.layers.0.attn.masked_bias": np.zeros((), np.float32),
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.zeros(3, np.float32),
    }
    old = write_model(tmp_path / "old")
    save_file(weights, old / "model.safetensors")
    assert read_shape(old).parameters == plain.parameters
    tied = read_shape(write_model(tmp_path / "tied", config={**CONFIG, "tie_word_embeddings": True}))
    assert tied.parameters == plain.parameters - 11 * 6
    headless = write_model(tmp_path / "headless")
    save_file(
        {name: value for name, value in tensors().items() if "lm_head" not in name}, headless / "model.safetensors"
    )
    assert read_shape(headless).tied_head is True


@given(st.integers(0, 10**6), st.integers(1, 3))
@example(0, 1)
@example(7, 1)
@examples(1 / 2)
def test_weights_cut_off_are_refused_by_name(at: int, shards: int) -> None:
    """A weights file that ends too early, wherever it was cut, is refused and named."""
    with model(shards=shards) as folder:
        file = weight_files(folder)[-1]
        content = file.read_bytes()
        file.write_bytes(content[: at % len(content)])
        with pytest.raises(ModelError, match=file.name) as caught:
            read_shape(folder)
        assert caught.value.hint


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_weights_flipped_header_never_escapes(at: int, flip: int) -> None:
    """A flipped bit in a header is refused by the file's name, or changes nothing but a tensor's name or type."""
    with model() as folder:
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        header = 8 + struct.unpack("<Q", content[:8])[0]
        content[at % header] ^= flip
        file.write_bytes(content)
        said = ""
        try:
            found = sorted(read_tensor_shapes(folder).values())
        except ModelError as error:
            said = str(error)
        if said:
            assert file.name in said
            assert "hint" in said
        else:
            assert at % header >= 8
            assert found == sorted(array.shape for array in tensors().values())


INDEXES = {
    "../outside.safetensors": "not a plain file name",
    "sub/model.safetensors": "not a plain file name",
    "/etc/passwd": "not a plain file name",
    "..": "index.json",
    "": "index.json",
    ".": "index.json",
    "missing.safetensors": "missing.safetensors",
    "a" * 300 + ".safetensors": "index.json",
    "a\0b": "index.json",
    7: "index.json",
    None: "index.json",
}


@pytest.mark.parametrize("name", INDEXES)
def test_index_that_names_no_shard_is_refused(name: Any, tmp_path: Path) -> None:
    """An index that names a file outside the folder, a missing one or no name at all is refused."""
    folder = write_model(tmp_path / "model", shards=2)
    save_file(tensors(), tmp_path / "outside.safetensors")
    (folder / "sub").mkdir()
    save_file(tensors(), folder / "sub" / "model.safetensors")
    write_index(folder, dict.fromkeys(tensors(), name))
    with pytest.raises(ModelError, match=r"index\.json") as caught:
        weight_files(folder)
    assert INDEXES[name] in caught.value.message


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', '{"weight_map": {}}', "[" * 50_000],
)
def test_index_broken_is_refused(text: str, tmp_path: Path) -> None:
    """An index that is no index, or names nothing, is refused by its name."""
    folder = write_model(tmp_path)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"index\.json"):
        read_shape(folder)


LINKS = {"../outside.safetensors": False, "../beside/w.safetensors": False, "real.safetensors": True, "/": False}


@pytest.mark.parametrize("target", LINKS)
@pytest.mark.parametrize("indexed", [False, True])
def test_weights_that_lead_out_of_the_folder_are_refused(target: str, indexed: bool, tmp_path: Path) -> None:
    """A weights file that is a link is read where it stays in its folder, and refused by name where it leads out."""
    folder = write_model(tmp_path / "model")
    (tmp_path / "beside").mkdir()
    for outside in (tmp_path / "outside.safetensors", tmp_path / "beside" / "w.safetensors"):
        shutil.copy(folder / "model.safetensors", outside)
    (folder / "model.safetensors").rename(folder / "real.safetensors")
    name = "model-00001-of-00001.safetensors" if indexed else "model.safetensors"
    (folder / name).symlink_to(tmp_path / "outside.safetensors" if target == "/" else target)
    if indexed:
        write_index(folder, dict.fromkeys(tensors(), name))
    if LINKS[target]:
        assert weight_files(folder) == [folder / name]
    else:
        with pytest.raises(ModelError, match="leads out of its folder") as caught:
            read_shape(folder)
        assert (name in caught.value.message, bool(caught.value.hint)) == (True, True)


def test_weights_that_are_a_link_to_itself_are_refused(tmp_path: Path) -> None:
    """A link that leads to itself is one clear error, as one that leads nowhere is."""
    folder = write_model(tmp_path / "model")
    for target in ("model.safetensors", "nowhere"):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(target)
        with pytest.raises(ModelError, match=r"leads to itself|No such file") as caught:
            read_shape(folder)
        assert caught.value.hint


def test_weights_of_the_hubs_cache_are_read_through_its_links(tmp_path: Path) -> None:
    """A snapshot's links into the blobs of its own repository are how the hub keeps files; another's are refused."""
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    folder = write_model(cache / "snapshots" / "123")
    for file in sorted(folder.iterdir()):
        blob = file.rename(cache / "blobs" / f"hash-of-{file.name}")
        file.symlink_to(f"../../blobs/{blob.name}")
    assert read_shape(folder).weights.keys() == tensors().keys()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../../outside")
    write_model(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "outside")
    with pytest.raises(ModelError, match="leads out"):
        read_shape(folder)


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    """Where the index passes over model.safetensors, programs would read different weights: refused with both names."""
    folder = write_model(tmp_path, shards=2)
    assert len(weight_files(folder)) == 2
    shutil.copy(weight_files(folder)[0], folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors, and model\.safetensors\.index\.json names other files"):
        weight_files(folder)


BROKEN_CONFIGS = ["", "{", "[]", "3", "null", "[" * 50_000, '{"a": ' + "9" * 5000 + "}", '"\ud800"']
ODD_CONFIGS = (
    {"vocab_size": "many"},
    {"vocab_size": None},
    {"vocab_size": 1.5},
    {"text_config": None},
    {"text_config": [1]},
    {"architectures": "Llama"},
    {"architectures": []},
    {"architectures": {}},
    {"architectures": 3},
    {"hidden_size": "6"},
    {"num_hidden_layers": None},
    {},
)


@pytest.mark.parametrize("text", BROKEN_CONFIGS)
def test_config_broken_is_refused(text: str, tmp_path: Path) -> None:
    """A config that is no JSON object is refused by its name."""
    folder = write_model(tmp_path)
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelError, match=r"config\.json"):
        read_shape(folder)


@pytest.mark.parametrize("config", ODD_CONFIGS)
def test_config_with_odd_fields_is_read_as_not_said(config: dict[str, Any], tmp_path: Path) -> None:
    """A size that is no whole number counts as not said (0); the weights still give parameters and layers."""
    shape = read_shape(write_model(tmp_path, config=config))
    assert (shape.vocab_size, shape.hidden_size, shape.layers) == (0, 0, 0)
    assert len(shape.linear_layers) == 2 * len(LAYERS)
    assert shape.architecture


@pytest.mark.parametrize("layers", [16, 10**9])
def test_config_of_more_layers_than_there_are_weights_is_refused(layers: int, tmp_path: Path) -> None:
    """A number of layers that the weights cannot bear out is refused with both numbers, before anybody builds them."""
    folder = write_model(tmp_path)
    held = len(read_tensor_shapes(folder))
    assert held == 15
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    with pytest.raises(ModelError, match=f"{layers:,} layers, and its files hold {held} weights"):
        read_shape(folder)


def test_folder_without_config_or_weights_is_refused(tmp_path: Path) -> None:
    """A folder that lacks its config or its weights is no model, and says which it lacks."""
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    for read in (lambda: locate_model(str(folder)), lambda: read_shape(folder)):
        with pytest.raises(ModelError, match="safetensors"):
            read()
    (folder / "config.json").unlink()
    for read in (lambda: locate_model(str(folder)), lambda: read_shape(folder)):
        with pytest.raises(ModelError, match=r"config\.json"):
            read()
    with pytest.raises(ModelError, match=r"config\.json"):
        locate_model(str(tmp_path))


def test_locate_finds_shipped_and_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shipped name is found in the package, a folder where it lies, absolute, relative or in the home folder."""
    folder = write_model(tmp_path / "größe model").resolve()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (str(folder), "größe model", "./größe model", "~/größe model"):
        location = locate_model(name)
        assert (location.name, location.folder, location.source) == (name, folder, "local")
    for name in SHIPPED:
        assert locate_model(name).folder == SHIPPED_FOLDER / name
        assert locate_model(name).source == "shipped"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="is a file"):
        locate_model("file")


UNKNOWN = (
    "nobody/nothing-here",
    "no-such-model",
    "./nowhere",
    "/nowhere/at/all",
    "~/nowhere",
    "~nosuchuser/model",
    "a..b",
    "a--b",
    "model.git",
    "aé/b",
    "a" * 300,
    "a" * 120 + "/b",
    "a/b/c",
    "a b",
    "a\0b",
    "\n",
    "-x",
    "https://x.org/y",
    "a/",
)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", UNKNOWN)
def test_locate_unknown_model_names_a_shipped_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever name leads nowhere, the error holds the name and a model that is always there; nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        locate_model(name)
    assert repr(name) in caught.value.message
    assert SHIPPED[0] in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def shape_of(folder: Path) -> ModelShape:
    """The shape of the little model."""
    return read_shape(write_model(folder))


@pytest.mark.parametrize("router", ["router", "gate", "shared_expert_gate"])
def test_all_linear_layers_are_those_without_a_router(router: str) -> None:
    """What chooses among experts gets no adapter unless it is named: PEFT knows it as no linear layer."""
    layers = tuple(LinearLayer(f"model.layers.0.mlp.{name}", (4, 8)) for name in ("q_proj", router, "gate_proj"))
    shape = ModelShape("GptOssForCausalLM", 96, 8, 8, 1, 64, layers)
    assert choose_layers(shape, "all-linear") == ("q_proj", "gate_proj")
    assert choose_layers(shape, [router]) == (router,)


@given(st.lists(st.sampled_from(["q_proj", "k_proj", "up_proj", "down_proj"]), min_size=1, unique=True), st.data())
@examples(1 / 2)
def test_choose_layers_takes_what_is_named_or_lists_what_exists(targets: list[str], data: st.DataObject) -> None:
    """Named layers are chosen, one name that matches nothing refuses them all and the existing names are listed."""
    with model() as folder:
        shape = read_shape(folder)
    existing = {"q_proj", "k_proj", "up_proj", "down_proj"}
    assert set(choose_layers(shape, "all-linear")) == existing
    assert choose_layers(shape, targets) == tuple(targets)
    wrong = data.draw(st.sampled_from(["q_prj", "lm_head", "embed_tokens", "norm", "model", "", "Q_PROJ", "proj"]))
    with pytest.raises(ModelError, match=repr(wrong)) as caught:
        choose_layers(shape, data.draw(st.permutations([*targets, wrong])))
    assert all(name in caught.value.hint for name in existing)
    assert not any(repr(name) in caught.value.message for name in targets)


@pytest.mark.parametrize(("modules", "largest"), [(("q_proj",), 6), (("k_proj",), 2), (("up_proj", "k_proj"), 2)])
def test_rank_may_be_as_large_as_the_smallest_side(modules: tuple[str, ...], largest: int, tmp_path: Path) -> None:
    """A rank up to the smaller side of every chosen layer is taken; one more is refused with layer and limit."""
    shape = shape_of(tmp_path)
    check_rank(shape, AdapterTarget(largest, 1.0, 0.0, modules))
    with pytest.raises(ModelError, match=f"rank {largest + 1} .*{modules[-1]}") as caught:
        check_rank(shape, AdapterTarget(largest + 1, 1.0, 0.0, modules))
    assert f"at most {largest}" in caught.value.hint
