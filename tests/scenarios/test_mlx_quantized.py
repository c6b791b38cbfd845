"""Laws of quantised bases in MLX: what is packed stays so, and an adapter learns on it as on what it stands for."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.errors import ModelError, TrainingError
from finetune.evidence.reload import check_reload
from finetune.memory.estimate import weight_bytes
from finetune.models.quantize import kept_in_full, quantize_shape
from finetune.models.shape import read_shape
from finetune.records import AdapterTarget, Batch, Quantization
from support.damages import Damage, changed_settings, damaged_tensors
from support.sessions import (
    CONTEXT,
    MODULES,
    PROMPTS,
    Bench,
    accumulated,
    adapter_bytes,
    all_logits,
    batches_of,
    in_full,
    make_model,
    make_rows,
    need,
    of_base,
    put,
    shake,
    step,
    train_a_little,
    weights,
)
from support.tolerances import apart

need("mlx")
import mlx.core as mx  # noqa: E402
from mlx_lm.tuner.utils import load_adapters  # noqa: E402
from mlx_lm.utils import load_model, quantize_model, save_config, save_model  # noqa: E402

from finetune.backends.mlx.adapter import write_mlx_adapter  # noqa: E402
from finetune.backends.mlx.packed import pack  # noqa: E402
from finetune.backends.mlx.probe import weight_bytes as measured  # noqa: E402

pytestmark = pytest.mark.tier2
ROWS = make_rows(7)
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
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Each kind of model, in full."""
    return make_model(f"mlx-{request.param}", tmp_path_factory.mktemp(request.param), **SIZES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A Llama in full."""
    return make_model("mlx-llama", tmp_path_factory.mktemp("llama"), **SIZES["llama"])


@pytest.fixture(scope="module")
def converted(llama: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The same Llama as mlx-lm quantises it."""
    return convert(llama, tmp_path_factory.mktemp("converted"))


def convert(bench: Bench, folder: Path, how: Quantization = HOW, predicate: Any = None) -> Bench:
    """Have mlx-lm itself quantise the model, as `mlx_lm.convert -q` does it."""
    model, config = load_model(bench.location.folder)
    model, config = quantize_model(model, config, how.group_size, how.bits, quant_predicate=predicate)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return bench.at(folder)


def alone(bench: Bench, adapter: Path | None = None) -> Any:
    """The logits of mlx-lm's own model, with an adapter in mlx-lm's format where there is one."""
    model = load_model(bench.location.folder)[0]
    model = load_adapters(model, str(adapter)).eval() if adapter else model
    return np.concatenate([np.array(model(mx.array([ids]))[0]) for ids in PROMPTS])


def packed(session: Any) -> set[str]:
    """The modules whose matrices are packed, by their names in files."""
    names = session.fingerprints()
    return {name.removesuffix(".scales") for name in names if name.endswith(".scales")}


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_model_quantised_on_loading_is_what_mlx_lm_converts(llama: Bench, how: Quantization, tmp_path: Path) -> None:
    """Quantised as it is loaded, or by mlx-lm beforehand: the same bytes, and mlx-lm's own logits."""
    files = convert(llama, tmp_path, how)
    ours, theirs = llama.open(quantize=how), files.open()
    assert ours.fingerprints() == theirs.fingerprints()
    assert len(packed(ours)) == CUT["llama"][0][how.group_size]
    assert np.array_equal(all_logits(ours), all_logits(theirs))
    assert apart(alone(files), all_logits(ours)) < 1e-4


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shape_tells_what_is_quantised_and_what_it_weighs(bench: Bench, how: Quantization, dtype: str) -> None:
    """Before a weight is loaded it is known which matrices will be packed, which stay, and all bytes to the last."""
    full = read_shape(bench.location.folder)
    shape = quantize_shape(full, how, "the model")
    session = bench.open(dtype=dtype, quantize=how)
    cut, all_of_them = CUT[bench.kind]
    assert set(shape.quantized) == packed(session)
    assert len(shape.quantized) == cut[how.group_size]
    assert len(kept_in_full(shape)) == all_of_them - cut[how.group_size]
    assert weight_bytes(shape, dtype) == measured(session) < weight_bytes(full, dtype)
    assert weight_bytes(full, dtype) == measured(bench.open(dtype=dtype))


@pytest.mark.parametrize("changes", [{}, {"kind": "dora"}, {"scaling": "rank_stabilized"}], ids=str)
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_gradients_are_those_on_the_full_weights_it_stands_for(
    bench: Bench, how: Quantization, changes: dict[str, Any], tmp_path: Path
) -> None:
    """On packed weights and on the same unpacked, one adapter has one loss and one gradient of each tensor."""
    target = bench.target(**changes)
    ours, theirs = bench.adapted(target, quantize=how), in_full(bench, tmp_path / "full", quantize=how).adapted(target)
    drawn, wanted = weights(ours), weights(theirs)
    assert {name: value.shape for name, value in drawn.items()} == {name: v.shape for name, v in wanted.items()}
    # Freshly drawn they are the same too: A from the true inputs, magnitudes from the lengths of unpacked rows.
    assert {name for name in drawn if drawn[name].any() and apart(drawn[name], wanted[name]) > 1e-6} == set()
    shake(ours)
    put(theirs, weights(ours))
    (loss, found), (exact, slopes) = accumulated(ours, *batches_of(ROWS, 3)), accumulated(theirs, Batch(ROWS))
    assert loss == pytest.approx(exact, rel=1e-5)
    assert found.keys() == slopes.keys() == drawn.keys()
    assert min(np.abs(value).max() for value in slopes.values()) > 0
    assert {name: share for name in slopes if (share := apart(found[name], slopes[name])) > 1e-4} == {}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_steps_change_exactly_the_adapter(bench: Bench, kind: Any) -> None:
    """Training changes every tensor of the adapter, and no byte of packed weights, scales, biases or others."""
    session, plain = bench.adapted(bench.target(kind=kind), quantize=HOW), bench.open(quantize=HOW)
    before, declared = session.fingerprints(), session.trainable_names()
    assert sorted(of_base(session).values()) == sorted(plain.fingerprints().values())
    train_a_little(session)
    after = session.fingerprints()
    assert {name for name in before if before[name] != after[name]} == set(declared)
    parts = [name.rsplit(".", 1)[-1] for name in of_base(session)]
    assert parts.count("scales") == parts.count("biases") == CUT[bench.kind][0][32]
    assert any(name.endswith(".base_layer.scales") for name in before)
    with session.adapter_disabled():
        assert np.array_equal(all_logits(session), all_logits(plain))


def test_resumed_run_is_the_same_run(bench: Bench, tmp_path: Path) -> None:
    """Stopped and continued on a base quantised anew, weights, moments and files are the same to the byte."""
    target = bench.target(kind="dora", dropout=0.3)
    session = bench.trained(target, quantize=HOW)
    session.save_state(tmp_path)
    again, other = (bench.adapted(target, seed=9, quantize=how) for how in (HOW, Quantization(8, 32)))
    for one in (session, again, other):
        if one is not session:
            one.load_state(tmp_path)
        step(one, batches_of(ROWS, 3))
    assert session.fingerprints() == again.fingerprints() != other.fingerprints()
    assert adapter_bytes(session, tmp_path / "0") == adapter_bytes(again, tmp_path / "1")


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_from_disk_is_adapted(bench: Bench, kind: Any, dtype: str, tmp_path: Path) -> None:
    """Merged into packed weights, or into the same unpacked before: one full model, to the byte, in one dtype.

    In float32 MLX and transformers load the adapted logits, but for rounding: packed weights stand for exact numbers.
    """
    ours = bench.adapted(bench.target(kind=kind), quantize=HOW, dtype=dtype)
    theirs = in_full(bench, tmp_path / "full", quantize=HOW, dtype=dtype).adapted(bench.target(kind=kind), dtype=dtype)
    shake(ours)
    put(theirs, weights(ours))
    tuned, files = all_logits(ours), []
    ours.check_saving()
    for folder, session in ((tmp_path / "0", ours), (tmp_path / "1", theirs)):
        folder.mkdir()
        session.save_model(folder)
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0] == files[1]
    assert np.array_equal(all_logits(ours), tuned)
    tensors = mx.load(str(tmp_path / "0" / "model.safetensors")).values()
    assert {str(tensor.dtype) for tensor in tensors} == {f"mlx.core.{dtype}"}
    assert not {"quantization", "quantization_config"} & json.loads(files[0]["config.json"]).keys()
    merged = bench.at(tmp_path / "0")
    assert merged.open().fingerprints().keys() == bench.open().fingerprints().keys()
    if dtype == "float32":
        assert apart(all_logits(merged.open()), tuned) < 1e-5
        assert apart(all_logits(bench.open(quantize=HOW)), tuned) > 1e-2
        read = bench.at(tmp_path / "0", "torch").open()
        assert read.loss(Batch(ROWS)) == pytest.approx(ours.loss(Batch(ROWS)), rel=1e-5)


@pytest.mark.usefixtures("warm_children")
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapter_in_a_fresh_process_gives_the_same_logits(bench: Bench, kind: Any, tmp_path: Path) -> None:
    """mlx-lm's own layers find the same logits on a base quantised likewise, and others on any other base."""
    session = bench.trained(bench.target(kind=kind), quantize=HOW)
    adapter_bytes(session, tmp_path / "saved")
    asked: dict[str, Any] = {"prompts": PROMPTS, "dtype": "float32"}
    found, other = (
        check_reload("mlx", session, bench.location, tmp_path / "saved", quantize=how, **asked) for how in (HOW, None)
    )
    assert found.difference <= found.allowed < found.difference_from_base / 10
    assert other.difference > 10 * other.allowed
    again = bench.open(quantize=HOW)
    again.load_adapter(tmp_path / "saved")
    assert np.array_equal(all_logits(again), all_logits(session))
    assert again.trainable_names() == []


def test_adapter_trained_on_packed_weights_is_pefts_and_mlx_lms(llama: Bench, converted: Bench, tmp_path: Path) -> None:
    """PEFT alone loads it on the full model, mlx-lm alone on its own quantised one, as we do on either."""
    session = converted.trained()
    (tmp_path / "mlx").mkdir()
    write_mlx_adapter(session.adapter, str(converted.location.folder), 2, tmp_path / "mlx")
    assert apart(alone(converted, tmp_path / "mlx"), all_logits(session)) < 1e-4
    adapter_bytes(session, tmp_path / "peft")
    ours, theirs = llama.open(), llama.at(llama.location.folder, "torch").open()
    for reader in (ours, theirs):
        reader.load_adapter(tmp_path / "peft")
    assert ours.adapter.layers.keys() == session.adapter.layers.keys()
    assert apart(all_logits(theirs), all_logits(ours)) < 1e-4


def test_model_that_mlx_lm_quantised_unevenly_is_read_as_it_is(llama: Bench, tmp_path: Path) -> None:
    """Layers with bits of their own, and layers left in full, are what the file says, and train, merge and weigh so."""

    def unevenly(path: str, module: Any) -> Any:
        own = {"group_size": 64, "bits": 6} if "down_proj" in path else {"group_size": 32, "bits": 3}
        return False if "v_proj" in path else own if path.endswith(("down_proj", "0.self_attn.q_proj")) else True

    files = convert(llama, tmp_path / "uneven", predicate=unevenly)
    shape, full = read_shape(files.location.folder), read_shape(llama.location.folder)
    assert (shape.weights, shape.linear_layers) == (full.weights, full.linear_layers)
    assert shape.parameters == full.parameters
    assert set(shape.quantized.values()) == {HOW, Quantization(6, 64), Quantization(3, 32)}
    session, base = files.trained(), files.open()
    left = {f"model.layers.{number}.self_attn.v_proj" for number in range(2)}
    assert packed(base) == set(shape.quantized) == packed(llama.open(quantize=HOW)) - left
    assert weight_bytes(shape, "float32") == measured(base)
    (tmp_path / "merged").mkdir()
    session.save_model(tmp_path / "merged")
    assert apart(all_logits(llama.at(tmp_path / "merged").open()), all_logits(session)) < 1e-5


def test_bits_and_groups_change_the_model(bench: Bench, tmp_path: Path) -> None:
    """Other bits are other weights and logits; more bits and smaller groups are nearer to the full model."""
    full, sessions = all_logits(bench.open()), [bench.open(quantize=Quantization(bits, 32)) for bits in (2, 4, 8)]
    assert len({tuple(sorted(session.fingerprints().items())) for session in sessions}) == 3
    away = [apart(all_logits(session), full) for session in sessions]
    assert away[0] > 2 * away[1] > 4 * away[2] > 0
    even = make_model("mlx-llama", tmp_path / "even", hidden_size=128, intermediate_size=256)
    exact, off = load_file(even.location.folder / "model.safetensors"), []
    for size in (32, 64, 128):
        found = in_full(even, tmp_path / str(size), quantize=Quantization(4, size)).location.folder
        rounded = load_file(found / "model.safetensors")
        off.append(sum(float(((rounded[name] - value) ** 2).sum()) for name, value in exact.items()))
    assert 0 < off[0] < off[1] < off[2]
    assert off[0] < 0.9 * off[2]


def test_packed_weights_cannot_be_trained_whole(bench: Bench, llama: Bench, tmp_path: Path) -> None:
    """A quantised base is not trained itself, nor is a packed module beside an adapter; what is not packed may be."""
    session = bench.adapted(quantize=HOW)
    before = session.fingerprints()
    with pytest.raises(ModelError, match="quantised"):
        session.attach(None, 0)
    tables = {"llama": ("lm_head",), "gpt2": ("wpe", "transformer.h.1.mlp.c_fc")}[bench.kind]
    for saved in tables:
        with pytest.raises(ModelError, match=f"{saved} is quantised"):
            session.attach(AdapterTarget(2, 4.0, 0.0, MODULES[bench.kind], saved=(saved,)), 0)
    assert session.fingerprints() == before
    if bench.kind == "llama":  # the rows of o_proj do not divide, so that it is not packed
        saved = "model.layers.0.self_attn.o_proj"
        session.attach(AdapterTarget(2, 4.0, 0.0, MODULES["llama"], saved=(saved,)), 0)
        assert f"base_model.model.{saved}.modules_to_save.default.weight" in session.trainable_names()
    fresh = bench.open(quantize=HOW)
    assert fresh.trainable_names() == []
    with pytest.raises(TrainingError, match="nothing is trainable"):
        fresh.accumulate(Batch(ROWS), 1.0)
    adapter_bytes(llama.adapted(AdapterTarget(2, 4.0, 0.0, ("q_proj",), saved=("lm_head",))), tmp_path / "whole")
    other = llama.open(quantize=HOW)
    with pytest.raises(ModelError, match="lm_head is quantised"):
        other.load_adapter(tmp_path / "whole")
    assert packed(other)


def _settings(**changes: Any) -> Damage:
    own = {"bits": 4, "group_size": 32, **changes}
    return changed_settings("config.json", quantization=own, quantization_config=own)


def _drop(end: str) -> Damage:
    def change(tensors: dict[str, Any]) -> None:
        del tensors[max(name for name in tensors if name.endswith(end))]

    return damaged_tensors("model.safetensors", change)


def _as_floats(tensors: dict[str, Any]) -> None:
    name = max(name for name in tensors if tensors[name].dtype == np.uint32)
    tensors[name] = tensors[name].astype(np.float32)


DAMAGES: dict[str, Damage] = {
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
def test_model_whose_files_do_not_bear_out_its_config_is_refused(converted: Bench, kind: str, tmp_path: Path) -> None:
    """A quantised model that is damaged, or quantised in a way that is not read here, is refused by its folder."""
    shutil.copytree(converted.location.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors.index.json").unlink()
    bench = converted.at(tmp_path)
    assert packed(bench.open())
    DAMAGES[kind](tmp_path)
    with pytest.raises(ModelError) as caught:
        bench.open()
    assert str(tmp_path) in str(caught.value)


def _as_the_hub_has_it(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)


def test_what_cannot_be_quantised_is_refused(llama: Bench, converted: Bench, tmp_path: Path) -> None:
    """Refused are a base that is quantised already, one of no row that divides, and rules that are mlx-lm's alone."""
    with pytest.raises(ModelError, match="quantised already, 4 bits in groups of 32"):
        converted.open(quantize=Quantization(8, 32))
    with pytest.raises(ModelError, match="groups of 128"):
        make_model("mlx-llama", tmp_path / "odd").open(quantize=Quantization(4, 128))
    gpt2 = make_model("mlx-gpt2", tmp_path / "gpt2", **SIZES["gpt2"])
    damaged_tensors("model.safetensors", _as_the_hub_has_it)(gpt2.location.folder)
    with pytest.raises(ModelError, match="GPT-2 that mlx-lm has quantised"):
        convert(gpt2, tmp_path / "turned").open()
    session = llama.open()
    session.loaded.model.quant_predicate = lambda path, module: True
    with pytest.raises(ModelError, match="otherwise than the rest"):
        pack(session.loaded.model, HOW, "the model")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_backends_refuse_quantised_bases(llama: Bench, converted: Bench, backend: str) -> None:
    """Both neither quantise nor take what is quantised, and name the backend that does."""
    for place, quantize in ((llama, HOW), (converted, None)):
        with pytest.raises(ModelError, match=f"the {backend} backend trains on full weights") as caught:
            place.at(place.location.folder, backend).open(quantize=quantize)
        assert "backend: mlx" in caught.value.hint
