"""Laws of quantised bases before one is loaded: true shapes, exact bytes, and refusals with a way out."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from finetune.abilities import ABILITIES, Abilities
from finetune.adapters.choose import choose_saved
from finetune.config import load_config
from finetune.errors import MissingExtraError, ModelError, install_line
from finetune.memory.estimate import weight_bytes
from finetune.models import quantize
from finetune.models.quantize import (
    SCHEMES,
    Scheme,
    kept_in_full,
    quantize_shape,
    read_quantized,
    refuse_schemes,
    say_quantized,
    unpacked,
)
from finetune.models.shape import read_shape
from finetune.records import LinearLayer, ModelLocation, ModelShape, Quantization
from finetune.training.prepare import planned_shape
from finetune_strategies.picks import between, pick
from finetune_strategies.profiles import examples

QUANTIZATIONS = st.builds(Quantization, pick(2, 3, 4, 5, 6, 8), pick(32, 64, 128))
MATRICES = {"lm_head": (11, 64), "model.layers.0.mlp.down_proj": (6, 96), "model.layers.0.self_attn.o_proj": (5, 18)}


def packed(outputs: int, inputs: int, how: Quantization) -> dict[str, tuple[int, ...]]:
    """The shapes in which mlx-lm keeps a matrix, by the last part of their names."""
    groups = (outputs, inputs // how.group_size)
    return {"weight": (outputs, inputs * how.bits // 32), "scales": groups, "biases": groups}


def write_model(folder: Path, how: Quantization) -> ModelLocation:
    """A model as mlx-lm quantises it; one matrix, whose rows do not divide, and a norm are in full."""
    tensors: dict[str, Any] = {"model.norm.weight": np.ones(64, np.float32)}
    for path, (outputs, inputs) in MATRICES.items():
        parts = packed(outputs, inputs, how) if inputs % how.group_size == 0 else {"weight": (outputs, inputs)}
        for part, shape in parts.items():
            kind = np.uint32 if part == "weight" and len(parts) > 1 else np.float32
            tensors[f"{path}.{part}"] = np.zeros(shape, kind)
    told = {"bits": how.bits, "group_size": how.group_size, "mode": "affine"}
    config = {"model_type": "llama", "vocab_size": 11, "quantization": told, "quantization_config": told}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return ModelLocation("packed", folder, "local")


@given(QUANTIZATIONS, QUANTIZATIONS, between(1, 9), between(1, 5))
@examples(0.5)
def test_shapes_behind_packed_ones_are_the_true_ones(
    how: Quantization, other: Quantization, outputs: int, groups: int
) -> None:
    """Whatever the bits and groups, of all or of one layer: the matrix is as wide as before it was packed."""
    wide = {"a.b": (outputs, groups * how.group_size), "a.c": (3, 2 * other.group_size)}
    files = {f"a.b.{part}": shape for part, shape in packed(*wide["a.b"], how).items()}
    files |= {f"a.c.{part}": shape for part, shape in packed(*wide["a.c"], other).items()}
    files |= {"a.d.weight": (7, 5), "a.c.bias": (3,)}
    told = {"bits": how.bits, "group_size": how.group_size}
    told["a.c"] = {"bits": other.bits, "group_size": other.group_size, "mode": "affine"}
    found = read_quantized({"quantization": told}, files, "the model")
    assert found == {"a.b": how, "a.c": other}
    assert unpacked(files, found) == {
        "a.b.weight": wide["a.b"],
        "a.c.weight": wide["a.c"],
        "a.d.weight": (7, 5),
        "a.c.bias": (3,),
    }
    narrower = files | {"a.b.weight": (outputs, files["a.b.weight"][1] + 1)}
    with pytest.raises(ModelError, match=r"a\.b is packed as"):
        read_quantized({"quantization": told}, narrower, "the model")


@given(QUANTIZATIONS, pick("float32", "bfloat16"), pick("LlamaForCausalLM", "GPT2LMHeadModel"), between(1, 300))
@examples(0.5)
def test_weight_is_a_hand_count(how: Quantization, dtype: str, architecture: str, inputs: int) -> None:
    """A matrix weighs its bits and two numbers a group if its rows divide into groups; all else weighs what it did."""
    sides = (inputs, 256) if architecture == "GPT2LMHeadModel" else (256, inputs)
    weights = {
        "a.q_proj.weight": sides,
        "embed_tokens.weight": (9, 128),
        "norm.weight": (128,),
        "a.q_proj.bias": (256,),
    }
    layers = (LinearLayer("a.q_proj", sides),)
    parameters = sum(math.prod(shape) for shape in weights.values())
    shape = ModelShape(architecture, parameters, 9, 128, 1, 64, layers, weights=weights)
    size = {"float32": 4, "bfloat16": 2}[dtype]
    assert weight_bytes(shape, dtype) == parameters * size
    expected, kept = (128 + 256) * size, []
    for path, rows, width in (("a.q_proj", 256, inputs), ("embed_tokens", 9, 128)):
        if width % how.group_size:
            expected, kept = expected + rows * width * size, [*kept, path]
        else:
            expected += rows * (width * how.bits // 8 + 2 * size * (width // how.group_size))
    found = quantize_shape(shape, how, "the model")
    assert weight_bytes(found, dtype) == expected
    assert kept_in_full(found) == kept


def asked(**said: Any) -> Any:
    """A configuration with these settings, dots written as two underscores."""
    overrides = {key.replace("__", "."): value for key, value in said.items()}
    return load_config(None, environ={}, overrides={"backend": "mlx", **overrides}, profile=None).config


def test_quantised_base_is_seen_and_refused_before_it_is_loaded(tmp_path: Path) -> None:
    """From headers alone: its true sizes; no torch, no full fine-tune, no second quantising, no packed module whole."""
    location = write_model(tmp_path / "model", Quantization(4, 32))
    shape = planned_shape(asked(), location)
    assert shape == read_shape(location.folder)
    assert shape.parameters == 64 + sum(math.prod(sides) for sides in MATRICES.values())
    assert {layer.name: layer.shape for layer in shape.linear_layers} == {
        path: sides for path, sides in MATRICES.items() if path != "lm_head"
    }
    assert set(shape.quantized) == {"lm_head", "model.layers.0.mlp.down_proj"}
    refusals = {
        "the torch backend trains on full weights and on those that bitsandbytes quantises": asked(backend="torch"),
        "the reference backend trains on full weights only": asked(backend="reference"),
        "cannot be trained": asked(adapter__kind="full"),
        "quantised already": asked(model__quantize="8bit"),
    }
    for words, config in refusals.items():
        with pytest.raises(ModelError, match=words) as caught:
            planned_shape(config, location)
        assert caught.value.hint
    assert choose_saved(shape, ("norm", "o_proj"), ("down_proj",)) == ("model.norm", "model.layers.0.self_attn.o_proj")
    with pytest.raises(ModelError, match="'lm_head' matches lm_head, quantised: it cannot be trained whole"):
        choose_saved(shape, ("lm_head",), ("down_proj",))


def test_full_base_is_planned_as_it_will_be_quantised(tmp_path: Path) -> None:
    """What is asked for counts in what is planned: groups that divide are packed, and where none does it is refused."""
    location = write_model(tmp_path / "model", Quantization(4, 32))
    tensors = {f"{path}.weight": np.zeros(sides, np.float32) for path, sides in MATRICES.items()}
    save_file(tensors, location.folder / "model.safetensors")
    (location.folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 11}))
    assert planned_shape(asked(), location).quantized == {}
    for size, count in ((32, 2), (64, 1)):
        config = asked(model__quantize="8bit", model__quantize_group_size=size)
        found = planned_shape(config, location).quantized
        assert set(found.values()) == {Quantization(8, size)}
        assert len(found) == count
    config = asked(model__quantize="4bit", model__quantize_group_size=128)
    with pytest.raises(ModelError, match="groups of 128") as caught:
        planned_shape(config, location)
    assert caught.value.hint == "set model.quantize_group_size to 64"
    save_file({"o_proj.weight": np.zeros((5, 18), np.float32)}, location.folder / "model.safetensors")
    with pytest.raises(ModelError, match="groups of 128") as caught:
        planned_shape(config, location)
    assert caught.value.hint == "leave out model.quantize"


BLOCKS = Scheme(
    by="nobody",
    says=lambda config: config.get("quantization_config") == {"quant_method": "blocks"},
    read=lambda config, shapes, owner: {
        name.removesuffix(".absmax"): Quantization(4, 64, "blocks") for name in shapes if name.endswith(".absmax")
    },
    unpacked=lambda shapes, quantized: {
        name: (size[0], 2 * size[1]) if name.removesuffix(".weight") in quantized else size
        for name, size in shapes.items()
        if not name.endswith(".absmax")
    },
    divides=lambda inputs, how: inputs >= how.group_size,
    groups=(64,),
    packed_bytes=lambda how, rows, columns, size: rows * columns // 2 + 4 * -(-rows * columns // how.group_size),
)
"""Made up: two numbers in each byte, one float32 for each block, whatever the format of the base."""


def test_another_scheme_is_a_description_and_an_ability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With these two alone a base is read, planned, counted, and refused by backends that lack the ability."""
    monkeypatch.setitem(SCHEMES, "blocks", BLOCKS)
    monkeypatch.setitem(ABILITIES, "reference", Abilities(schemes={"4bit": "blocks"}))
    tensors = {"a.q_proj.weight": np.zeros((6, 48), np.uint8), "a.q_proj.absmax": np.zeros(9, np.float32)}
    tensors |= {"norm.weight": np.zeros(64, np.float32)}
    config = {"model_type": "llama", "quantization_config": {"quant_method": "blocks"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    location = ModelLocation("blocks", tmp_path, "local")
    shape = planned_shape(asked(backend="reference"), location)
    assert shape.quantized == {"a.q_proj": Quantization(4, 64, "blocks")}
    assert shape.weights["a.q_proj.weight"] == (6, 96)
    assert weight_bytes(shape, "bfloat16") == 6 * 48 + 9 * 4 + 64 * 2
    for backend in ("torch", "mlx"):
        with pytest.raises(ModelError, match=f"the {backend} backend trains on full weights"):
            planned_shape(asked(backend=backend), location)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a.q_proj.weight": np.zeros((6, 96), np.float32)}, tmp_path / "model.safetensors")
    how = asked(backend="reference", model__quantize="4bit").quantization
    assert how == Quantization(4, 64, "blocks")
    assert planned_shape(asked(backend="reference", model__quantize="4bit"), location).quantized == {"a.q_proj": how}
    refuse_schemes({}, how, "reference", "it")
    with pytest.raises(ModelError, match="full weights and on those that mlx-lm has quantised"):
        refuse_schemes({}, how, "mlx", "it")


@given(
    pick("4bit", "fp4", "8bit"),
    pick("float32", "bfloat16"),
    pick("LlamaForCausalLM", "GPT2LMHeadModel"),
    between(1, 300),
)
@examples(0.5)
def test_weight_that_bitsandbytes_packs_is_a_hand_count(word: str, dtype: str, architecture: str, inputs: int) -> None:
    """Half a byte each and four for 64 of a row, or one each and four a row; tables, head and odd rows stay."""
    sides = (inputs, 256) if architecture == "GPT2LMHeadModel" else (256, inputs)
    weights = {"a.q_proj.weight": sides, "a.o_proj.weight": (64, 64), "wte.weight": (9, 64), "lm_head.weight": (9, 64)}
    layers = tuple(LinearLayer(f"a.{name}", weights[f"a.{name}.weight"]) for name in ("q_proj", "o_proj"))
    parameters = sum(math.prod(shape) for shape in weights.values())
    shape = ModelShape(architecture, parameters, 9, 64, 1, 64, layers, weights=weights)
    how = asked(backend="torch", model__quantize=word).quantization
    size, expected, kept = {"float32": 4, "bfloat16": 2}[dtype], 0, ["wte", "lm_head"]
    for rows, width in ((256, inputs), (64, 64)):
        if word == "8bit":
            expected += rows * (width + 4)
        elif width % 64 == 0:
            expected += rows * width // 2 + 4 * (rows * width // 64)
        else:
            expected, kept = expected + rows * width * size, ["a.q_proj", *kept]
    found = quantize_shape(shape, how, "the model")
    assert weight_bytes(found, dtype) == expected + 2 * 9 * 64 * size
    assert kept_in_full(found) == kept


def test_base_is_not_quantised_without_the_library_that_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line that installs bitsandbytes is said before any work, and only where it is needed."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a.q_proj.weight": np.zeros((6, 64), np.float32)}, tmp_path / "model.safetensors")
    location = ModelLocation("full", tmp_path, "local")
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    for word in ("4bit", "fp4", "8bit"):
        with pytest.raises(MissingExtraError, match="needs bitsandbytes, which is not installed") as caught:
            planned_shape(asked(backend="torch", model__quantize=word), location)
        assert install_line("bitsandbytes") in caught.value.hint
        assert caught.value.exit_code == 3
    assert planned_shape(asked(backend="torch"), location).quantized == {}
    assert planned_shape(asked(model__quantize="4bit"), location).quantized
    monkeypatch.setattr(quantize, "find_spec", lambda name: name)
    found = planned_shape(asked(backend="torch", model__quantize="4bit"), location)
    assert found.quantized == {"a.q_proj": Quantization(4, 64, "nf4")}
    assert say_quantized(found) == "4 bits (nf4) in groups of 64"
    found = planned_shape(asked(backend="torch", model__quantize="8bit"), location)
    assert say_quantized(found) == "8 bits (int8) with one scale for each row"
