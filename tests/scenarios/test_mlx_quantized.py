"""Laws of quantised bases in MLX: what is packed stays so, and an adapter learns on it as on what it stands for."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.backends import open_backend
from finetune.errors import ModelError, TrainingError
from finetune.evidence.reload import check_reload
from finetune.memory.estimate import weight_bytes
from finetune.models.quantize import kept_in_full, quantize_shape
from finetune.models.shape import read_shape
from finetune.records import AdapterTarget, Batch, ModelLocation, Quantization
from support.damages import changed_settings, damaged_tensors
from support.tiny_mlx import (
    accumulated,
    adapted,
    close,
    equal,
    furthest,
    logits_of,
    make_model,
    mx,
    open_session,
    set_weights,
    shake,
    weights,
)
from support.tiny_models import (
    CONTEXT,
    MODULES,
    adapter_bytes,
    batches_of,
    make_rows,
    step,
    target_of,
    train_a_little,
)

pytestmark = pytest.mark.tier2
ROWS = make_rows(7)
PROMPTS = [list(row.ids) for row in ROWS]
SIZES: dict[str, dict[str, Any]] = {
    # Rows of 96 divide into groups of 32 only, those of 128 into all, and the 18 that heads give back into none.
    "llama": {"hidden_size": 96, "intermediate_size": 128, "rms_norm_eps": 1e-6, "initializer_range": 0.1},
    # Stored the other way round: of c_fc, 32 x 128, the rows are 32 long.
    "gpt2": {"n_embd": 32, "n_head": 4, "n_ctx": CONTEXT, "layer_norm_epsilon": 1e-5, "initializer_range": 0.15},
}
HOW = Quantization(4, 32)
WAYS = (HOW, Quantization(8, 32), Quantization(4, 64))
CUT = {"llama": ({32: 14, 64: 2}, 16), "gpt2": ({32: 10, 64: 2}, 10)}
"""Matrices that are quantised by size of their groups, and all that there are."""


@pytest.fixture(scope="module", params=list(SIZES))
def location(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelLocation:
    """Each kind of model, in full."""
    return make_model(request.param, tmp_path_factory.mktemp(request.param), **SIZES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelLocation:
    """A Llama in full."""
    return make_model("llama", tmp_path_factory.mktemp("llama"), **SIZES["llama"])


@pytest.fixture(scope="module")
def converted(llama: ModelLocation, tmp_path_factory: pytest.TempPathFactory) -> ModelLocation:
    """The same Llama as mlx-lm quantises it."""
    return convert(llama, tmp_path_factory.mktemp("converted"))


def convert(location: ModelLocation, folder: Path, how: Quantization = HOW, predicate: Any = None) -> ModelLocation:
    """Have mlx-lm itself quantise the model, as `mlx_lm.convert -q` does it."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(location.folder)
    model, config = quantize_model(model, config, how.group_size, how.bits, quant_predicate=predicate)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return ModelLocation(location.name, folder, "local")


def in_full(location: ModelLocation, folder: Path, **opening: Any) -> ModelLocation:
    """The full model that a quantised one stands for."""
    folder.mkdir()
    open_session(location, **opening).save_model(folder)
    return ModelLocation(location.name, folder, "local")


def trained(location: ModelLocation, **how: Any) -> Any:
    """A session whose adapter has gone a few steps on a quantised base."""
    session = adapted(location, **{"quantize": HOW, **how})
    train_a_little(session)
    return session


def of_base(session: Any) -> dict[str, str]:
    """The hashes of all that is not trained."""
    names = session.trainable_names()
    return {name: mark for name, mark in session.fingerprints().items() if name not in names}


def packed(session: Any) -> set[str]:
    """The modules whose matrices are packed, by their names in files."""
    names = session.fingerprints()
    return {name.removesuffix(".scales") for name in names if name.endswith(".scales")}


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_model_quantised_on_loading_is_what_mlx_lm_converts(
    llama: ModelLocation, how: Quantization, tmp_path: Path
) -> None:
    """Quantised as it is loaded, or by mlx-lm beforehand: the same bytes, and mlx-lm's own logits."""
    from mlx_lm.utils import load_model

    files = convert(llama, tmp_path, how)
    ours, theirs = open_session(llama, quantize=how), open_session(files)
    assert ours.fingerprints() == theirs.fingerprints()
    assert len(packed(ours)) == CUT["llama"][0][how.group_size]
    assert equal(logits_of(ours, PROMPTS), logits_of(theirs, PROMPTS))
    alone = load_model(files.folder)[0]
    logits = [np.array(alone(mx.array([ids]))[0]) for ids in PROMPTS]
    assert furthest(logits, logits_of(ours, PROMPTS)) < 1e-4


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shape_tells_what_is_quantised_and_what_it_weighs(
    location: ModelLocation, how: Quantization, dtype: str
) -> None:
    """Before a weight is loaded it is known which matrices will be packed, which stay, and all bytes to the last."""
    from finetune.backends.mlx.probe import weight_bytes as measured

    full = read_shape(location.folder)
    shape = quantize_shape(full, how, "the model")
    session = open_session(location, dtype=dtype, quantize=how)
    cut, all_of_them = CUT[location.name]
    assert set(shape.quantized) == packed(session)
    assert len(shape.quantized) == cut[how.group_size]
    assert len(kept_in_full(shape)) == all_of_them - cut[how.group_size]
    assert weight_bytes(shape, dtype) == measured(session) < weight_bytes(full, dtype)
    assert weight_bytes(full, dtype) == measured(open_session(location, dtype=dtype))


@pytest.mark.parametrize("changes", [{}, {"kind": "dora"}, {"scaling": "rank_stabilized"}], ids=str)
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_gradients_are_those_on_the_full_weights_it_stands_for(
    location: ModelLocation, how: Quantization, changes: dict[str, Any], tmp_path: Path
) -> None:
    """P-GRAD: on packed weights and on the same unpacked, one adapter has one loss and one gradient of each tensor."""
    target = replace(target_of(location.name), **changes)
    ours = adapted(location, target=target, quantize=how)
    theirs = adapted(in_full(location, tmp_path / "full", quantize=how), target=target)
    assert weights(ours).keys() == weights(theirs).keys()
    assert {name: value.shape for name, value in weights(ours).items()} == {
        name: value.shape for name, value in weights(theirs).items()
    }
    # Freshly drawn they are the same too: A from the true inputs, magnitudes from the lengths of unpacked rows.
    assert close(weights(ours), weights(theirs), 1e-6)
    shake(ours)
    set_weights(theirs, weights(ours))
    (loss, found), (wanted, expected) = accumulated(ours, *batches_of(ROWS, 3)), accumulated(theirs, Batch(ROWS))
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert len(found) >= 8
    assert min(np.abs(value).max() for value in expected.values()) > 0
    assert close(found, expected)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_steps_change_exactly_the_adapter(location: ModelLocation, kind: Any) -> None:
    """P-GRAD: training changes every tensor of the adapter, and no byte of packed weights, scales, biases or others."""
    session = adapted(location, target=replace(target_of(location.name), kind=kind), quantize=HOW)
    plain = open_session(location, quantize=HOW).fingerprints()
    before, declared = session.fingerprints(), session.trainable_names()
    assert sorted(of_base(session).values()) == sorted(plain.values())
    for number in range(3):
        step(session, batches_of(make_rows(5, seed=number), 2))
    after = session.fingerprints()
    assert {name for name in before if before[name] != after[name]} == set(declared)
    parts = [name.rsplit(".", 1)[-1] for name in of_base(session)]
    assert parts.count("scales") == parts.count("biases") == CUT[location.name][0][32]
    assert any(name.endswith(".base_layer.scales") for name in before)
    with session.adapter_disabled():
        assert equal(logits_of(session, PROMPTS), logits_of(open_session(location, quantize=HOW), PROMPTS))


def test_resumed_run_is_the_same_run(location: ModelLocation, tmp_path: Path) -> None:
    """P-RESUME: stopped and continued on a base quantised anew, weights, moments and files are the same to the byte."""
    target = replace(target_of(location.name, dropout=0.3), kind="dora")
    session = trained(location, target=target)
    session.save_state(tmp_path)
    again = adapted(location, target=target, seed=9, quantize=HOW)
    again.load_state(tmp_path)
    for one in (session, again):
        step(one, batches_of(ROWS, 3))
    assert session.fingerprints() == again.fingerprints()
    files = [adapter_bytes(one, tmp_path / str(number)) for number, one in enumerate((session, again))]
    assert files[0] == files[1]
    other = adapted(location, target=target, quantize=Quantization(8, 32))
    other.load_state(tmp_path)
    step(other, batches_of(ROWS, 3))
    assert other.fingerprints() != session.fingerprints()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_from_disk_is_adapted(location: ModelLocation, kind: Any, tmp_path: Path) -> None:
    """P-MERGE: merged, the model is a full one that MLX and transformers load alike: the adapted logits, not others.

    It differs by rounding alone: packed weights stand for exact numbers.
    """
    session = adapted(location, target=replace(target_of(location.name), kind=kind), quantize=HOW)
    shake(session)
    tuned = logits_of(session, PROMPTS)
    session.check_saving()
    session.save_model(tmp_path)
    assert equal(logits_of(session, PROMPTS), tuned)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & written.keys()
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {np.dtype(np.float32)}
    merged = open_session(ModelLocation(location.name, tmp_path, "local"))
    assert merged.fingerprints().keys() == open_session(location).fingerprints().keys()
    base = logits_of(open_session(location, quantize=HOW), PROMPTS)
    largest = max(float(np.abs(each).max()) for each in tuned)
    assert furthest(logits_of(merged, PROMPTS), tuned) < 1e-5 * largest
    assert furthest(base, tuned) > 1e-2 * largest
    pytest.importorskip("torch", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
    theirs = open_backend("torch").open(ModelLocation(location.name, tmp_path, "local"), "float32", 0)
    assert theirs.loss(Batch(ROWS)) == pytest.approx(session.loss(Batch(ROWS)), rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_is_what_merging_into_the_full_weights_gives(
    location: ModelLocation, dtype: str, kind: Any, tmp_path: Path
) -> None:
    """P-MERGE: merged into packed weights, or into the same unpacked before: one file, to the byte, in one dtype."""
    target = replace(target_of(location.name), kind=kind)
    ours = adapted(location, target=target, quantize=HOW, dtype=dtype)
    theirs = adapted(in_full(location, tmp_path / "full", quantize=HOW, dtype=dtype), target=target, dtype=dtype)
    shake(ours)
    set_weights(theirs, weights(ours))
    files = []
    for number, session in enumerate((ours, theirs)):
        (tmp_path / str(number)).mkdir()
        session.save_model(tmp_path / str(number))
        files.append({path.name: path.read_bytes() for path in (tmp_path / str(number)).iterdir()})
    assert files[0] == files[1]
    tensors = mx.load(str(tmp_path / "0" / "model.safetensors"))
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"mlx.core.{dtype}"}
    assert len(tensors) > 20


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapter_in_a_fresh_process_gives_the_same_logits(location: ModelLocation, kind: Any, tmp_path: Path) -> None:
    """P-ART: mlx-lm's own layers find the same logits on a base quantised likewise, and others on any other base."""
    session = trained(location, target=replace(target_of(location.name), kind=kind))
    adapter_bytes(session, tmp_path / "saved")
    found, other = (
        check_reload("mlx", session, location, tmp_path / "saved", prompts=PROMPTS, dtype="float32", quantize=quantize)
        for quantize in (HOW, None)
    )
    assert found.difference <= 1e-4 * found.largest_logit
    assert found.difference_from_base > 1e-2 * found.largest_logit
    assert other.difference > 1e-3 * other.largest_logit
    again = open_session(location, quantize=HOW)
    again.load_adapter(tmp_path / "saved")
    assert equal(logits_of(again, PROMPTS), logits_of(session, PROMPTS))
    assert again.trainable_names() == []


def test_adapter_trained_on_packed_weights_is_pefts_and_mlx_lms(
    llama: ModelLocation, converted: ModelLocation, tmp_path: Path
) -> None:
    """P-ART: PEFT alone loads it on the full model, mlx-lm alone on its own quantised one, as we do on either."""
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    from finetune.backends.mlx.adapter import write_mlx_adapter

    session = trained(converted, quantize=None)
    (tmp_path / "mlx").mkdir()
    write_mlx_adapter(session.adapter, str(converted.folder), 2, tmp_path / "mlx")
    alone = load_adapters(load_model(converted.folder)[0], str(tmp_path / "mlx")).eval()
    logits = [np.array(alone(mx.array([ids]))[0]) for ids in PROMPTS]
    assert furthest(logits, logits_of(session, PROMPTS)) < 1e-4
    adapter_bytes(session, tmp_path / "peft")
    ours = open_session(llama)
    ours.load_adapter(tmp_path / "peft")
    assert ours.adapter.layers.keys() == session.adapter.layers.keys()
    pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama.folder), str(tmp_path / "peft")).eval()
    import torch

    with torch.no_grad():
        theirs = [plain(input_ids=torch.tensor([ids])).logits[0].numpy() for ids in PROMPTS]
    assert furthest(theirs, logits_of(ours, PROMPTS)) < 1e-4 * float(np.abs(theirs[0]).max())


def test_model_that_mlx_lm_quantised_unevenly_is_read_as_it_is(llama: ModelLocation, tmp_path: Path) -> None:
    """Layers with bits of their own, and layers left in full, are what the file says, and train, merge and weigh so."""
    from finetune.backends.mlx.probe import weight_bytes as measured

    def unevenly(path: str, module: Any) -> Any:
        own = {"group_size": 64, "bits": 6} if "down_proj" in path else {"group_size": 32, "bits": 3}
        return False if "v_proj" in path else own if path.endswith(("down_proj", "0.self_attn.q_proj")) else True

    files = convert(llama, tmp_path / "uneven", predicate=unevenly)
    shape, full = read_shape(files.folder), read_shape(llama.folder)
    assert shape.weights == full.weights
    assert shape.parameters == full.parameters
    assert shape.linear_layers == full.linear_layers
    assert set(shape.quantized.values()) == {HOW, Quantization(6, 64), Quantization(3, 32)}
    session, base = trained(files, quantize=None), open_session(files)
    left = {f"model.layers.{number}.self_attn.v_proj" for number in range(2)}
    assert packed(base) == set(shape.quantized) == packed(open_session(llama, quantize=HOW)) - left
    assert weight_bytes(shape, "float32") == measured(base)
    tuned = logits_of(session, PROMPTS)
    (tmp_path / "merged").mkdir()
    session.save_model(tmp_path / "merged")
    merged = logits_of(open_session(ModelLocation("llama", tmp_path / "merged", "local")), PROMPTS)
    assert furthest(merged, tuned) < 1e-5 * max(float(np.abs(each).max()) for each in tuned)


def test_bits_change_the_model(location: ModelLocation) -> None:
    """P-KNOB: other bits are other weights and logits; more bits are nearer to the full model."""
    full = logits_of(open_session(location), PROMPTS)
    ways = [Quantization(bits, 32) for bits in (2, 4, 8)]
    sessions = [open_session(location, quantize=how) for how in ways]
    marks = [tuple(sorted(session.fingerprints().items())) for session in sessions]
    assert len(set(marks)) == len(ways)
    away = [furthest(logits_of(session, PROMPTS), full) for session in sessions]
    assert away == sorted(away, reverse=True)
    assert away[0] > 2 * away[1] > 4 * away[2] > 0


def test_smaller_groups_are_nearer_to_the_full_model(tmp_path: Path) -> None:
    """P-KNOB: where every row divides, groups of 32 round less than those of 128."""
    location = make_model("llama", tmp_path, hidden_size=128, intermediate_size=256)
    full = weights_of(open_session(location))
    away = []
    for size in (32, 64, 128):
        folder = in_full(location, tmp_path / str(size), quantize=Quantization(4, size)).folder
        found = load_file(folder / "model.safetensors")
        away.append(sum(float(((found[name] - value) ** 2).sum()) for name, value in full.items()))
    assert away == sorted(away)
    assert 0 < away[0] < 0.9 * away[2]


def weights_of(session: Any) -> dict[str, Any]:
    """Every weight of a full model."""
    return {name: np.array(value) for name, value in session._tensors().items()}


def test_packed_weights_cannot_be_trained_whole(location: ModelLocation, llama: ModelLocation, tmp_path: Path) -> None:
    """A quantised base is not trained itself, nor is a packed module beside an adapter; what is not packed may be."""
    session = adapted(location, quantize=HOW)
    before = session.fingerprints()
    with pytest.raises(ModelError, match="quantised"):
        session.attach(None, 0)
    table = {"llama": "lm_head", "gpt2": "wpe"}[location.name]
    for saved in (
        table,
        {"llama": "model.layers.0.self_attn.o_proj", "gpt2": "transformer.h.1.mlp.c_fc"}[location.name],
    ):
        target = AdapterTarget(2, 4.0, 0.0, MODULES[location.name], saved=(saved,))
        if "o_proj" in saved:  # its rows do not divide, so that it is not packed
            session.attach(target, 0)
            assert f"base_model.model.{saved}.modules_to_save.default.weight" in session.trainable_names()
            session.attach(target_of(location.name), 0)
            continue
        with pytest.raises(ModelError, match=f"{saved} is quantised"):
            session.attach(target, 0)
    assert session.fingerprints() == before
    fresh = open_session(location, quantize=HOW)
    assert fresh.trainable_names() == []
    with pytest.raises(TrainingError, match="nothing is trainable"):
        fresh.accumulate(Batch(ROWS), 1.0)
    full = adapted(llama, target=AdapterTarget(2, 4.0, 0.0, ("q_proj",), saved=("lm_head",)))
    adapter_bytes(full, tmp_path / "whole")
    other = open_session(llama, quantize=HOW)
    with pytest.raises(ModelError, match="lm_head is quantised"):
        other.load_adapter(tmp_path / "whole")
    assert packed(other)


def _settings(**changes: Any) -> Callable[[Path], None]:
    own = {"bits": 4, "group_size": 32, **changes}
    return changed_settings("config.json", quantization=own, quantization_config=own)


def _drop(end: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, Any]) -> None:
        del tensors[max(name for name in tensors if name.endswith(end))]

    return damaged_tensors("model.safetensors", change)


def _as_floats(tensors: dict[str, Any]) -> None:
    name = max(name for name in tensors if tensors[name].dtype == np.uint32)
    tensors[name] = tensors[name].astype(np.float32)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "other bits": _settings(bits=8),
    "other groups": _settings(group_size=64),
    "both, alike in size": _settings(bits=2, group_size=64),
    "bits of nobody": _settings(bits=7),
    "bits as text": _settings(bits="4"),
    "bits of true": _settings(bits=True),
    "groups of nobody": _settings(group_size=48),
    "no groups": _settings(group_size=None),
    "mode": _settings(mode="mxfp4"),
    "layer's own": _settings(lm_head={"bits": 8, "group_size": 32}),
    "layer not quantised": _settings(lm_head=False),
    "no mapping": changed_settings("config.json", quantization=[4, 32]),
    "by somebody else": changed_settings(
        "config.json", quantization="absent", quantization_config={"quant_method": "gptq", "bits": 4}
    ),
    "by nobody": changed_settings("config.json", quantization="absent", quantization_config={"bits": 4}),
    "unsaid": changed_settings("config.json", quantization="absent", quantization_config="absent"),
    "without scales": _drop(".scales"),
    "without biases": _drop(".biases"),
    "without weights": _drop("mlp.up_proj.weight"),
    "as floats": damaged_tensors("model.safetensors", _as_floats),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_model_whose_files_do_not_bear_out_its_config_is_refused(
    converted: ModelLocation, kind: str, tmp_path: Path
) -> None:
    """A quantised model that is damaged, or quantised in a way that is not read here, is refused by its folder."""
    assert len(DAMAGES) == 19
    for file in converted.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    index.unlink()
    location = ModelLocation("llama", tmp_path, "local")
    assert packed(open_session(location))
    DAMAGES[kind](tmp_path)
    with pytest.raises(ModelError) as caught:
        open_session(location)
    assert str(tmp_path) in str(caught.value)


def _as_the_hub_has_it(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)


def test_what_cannot_be_quantised_is_refused(llama: ModelLocation, converted: ModelLocation, tmp_path: Path) -> None:
    """Refused are a base that is quantised already, one of no row that divides, and rules that are mlx-lm's alone."""
    with pytest.raises(ModelError, match="quantised already, 4 bits in groups of 32"):
        open_session(converted, quantize=Quantization(8, 32))
    with pytest.raises(ModelError, match="groups of 128"):
        open_session(make_model("llama", tmp_path / "odd"), quantize=Quantization(4, 128))
    gpt2 = make_model("gpt2", tmp_path / "gpt2", **SIZES["gpt2"])
    damaged_tensors("model.safetensors", _as_the_hub_has_it)(gpt2.folder)
    with pytest.raises(ModelError, match="GPT-2 that mlx-lm has quantised"):
        open_session(convert(gpt2, tmp_path / "turned"))
    session = open_session(llama)
    session.loaded.model.quant_predicate = lambda path, module: True
    from finetune.backends.mlx.packed import pack

    with pytest.raises(ModelError, match="otherwise than the rest"):
        pack(session.loaded.model, HOW, "the model")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_backends_refuse_quantised_bases(llama: ModelLocation, converted: ModelLocation, backend: str) -> None:
    """Both neither quantise nor take what is quantised, and name the backend that does."""
    if backend == "torch":
        pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
    for place, quantize in ((llama, HOW), (converted, None)):
        with pytest.raises(ModelError, match=f"the {backend} backend trains on full weights only") as caught:
            open_backend(backend).open(place, "float32", 0, quantize=quantize)
        assert "backend: mlx" in caught.value.hint
