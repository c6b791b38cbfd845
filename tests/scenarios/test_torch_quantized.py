"""Laws of bases that bitsandbytes quantises for torch: what is packed stays so, and stands for known full weights."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune import train as pipeline
from finetune.backends import open_backend
from finetune.config import load_config
from finetune.errors import ModelError, RefusedError
from finetune.events import CheckpointSaved, Event
from finetune.evidence.reload import check_reload
from finetune.evidence.reopen import compare, reopen
from finetune.memory.estimate import weight_bytes
from finetune.memory.forecast import forecast_memory
from finetune.memory.framework import FRAMEWORKS
from finetune.memory.load import load_of
from finetune.models.quantize import kept_in_full, quantize_shape
from finetune.models.shape import read_shape
from finetune.models.travel import public_name
from finetune.records import Batch, ModelLocation, Optimization, Quantization
from finetune_strategies.tokenizers import KINDS, tokenizer_folder
from support.damages import changed_settings
from support.sessions import (
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
from support.workplace import LLAMA, QUICK, Death, make_data, resume

need("torch")
if find_spec("bitsandbytes") is None:
    pytest.skip("needs the bitsandbytes extra: pip install 'finetune-suite[bitsandbytes]'", allow_module_level=True)
from safetensors.numpy import load_file  # noqa: E402
from safetensors.torch import load_file as read_tensors  # noqa: E402

from finetune.backends.torch.packed import PackedLinear  # noqa: E402
from finetune.backends.torch.probe import peak_tensors  # noqa: E402
from finetune.backends.torch.probe import weight_bytes as measured  # noqa: E402
from finetune.backends.torch.sharding import shard  # noqa: E402

pytestmark = pytest.mark.tier2
ROWS = make_rows(7)
SIZES: dict[str, dict[str, Any]] = {
    # Rows of 192 and 128 divide into groups, and the 18 that heads give back do not.
    "llama": {"hidden_size": 192, "intermediate_size": 128, "initializer_range": 0.1},
    # Stored the other way round: c_fc, 64 x 256, has rows of 64.
    "gpt2": {
        "n_embd": 64,
        "n_head": 4,
        "initializer_range": 0.15,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
}
NF4, FP4, INT8 = (Quantization(bits, 64, scheme) for bits, scheme in ((4, "nf4"), (4, "fp4"), (8, "int8")))
WAYS = (NF4, FP4, INT8)
CUT = {("llama", 4): 12, ("llama", 8): 14, ("gpt2", 4): 8, ("gpt2", 8): 8}
"""How many matrices are packed, by bits."""
CODES = {
    # The quantiles of a normal distribution of Dettmers et al. 2023, appendix E.
    "nf4": [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    # Twelfths with two bits of exponent and one of mantissa, and a 192nd in the place of the smallest.
    "fp4": [sign * part for sign in (-1, 1) for part in (0.0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0)],
}


@pytest.fixture(scope="module", params=list(SIZES))
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Each kind of model, in full."""
    return make_model(f"torch-{request.param}", tmp_path_factory.mktemp(request.param), **SIZES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A Llama in full."""
    return make_model("torch-llama", tmp_path_factory.mktemp("llama"), **SIZES["llama"])


def packed(session: Any) -> set[str]:
    """The modules whose matrices are packed."""
    return {path for path, module in session.model.named_modules() if isinstance(module, PackedLinear)}


def nearest(matrix: Any, how: Quantization) -> Any:
    """What a matrix (outputs, inputs) is quantised to, each number by itself, in float64."""
    if how.scheme == "int8":
        scale = np.abs(matrix).max(axis=1, keepdims=True) / 127
        return np.round(matrix / scale) * scale
    code = np.array(CODES[how.scheme])
    groups = matrix.reshape(-1, how.group_size)
    scale = np.abs(groups).max(axis=1, keepdims=True)
    return (code[np.abs((groups / scale)[..., None] - code).argmin(-1)] * scale).reshape(matrix.shape)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_packed_matrix_stands_for_the_nearest_numbers(bench: Bench, how: Quantization, tmp_path: Path) -> None:
    """Written in full, each packed matrix has the nearest number of its scheme in each place; all else is as it was."""
    shape = quantize_shape(read_shape(bench.location.folder), how, "the model")
    assert len(shape.quantized) == len(packed(bench.open(quantize=how))) == CUT[bench.kind, how.bits]
    before = load_file(bench.location.folder / "model.safetensors")
    found = load_file(in_full(bench, tmp_path / "full", quantize=how).location.folder / "model.safetensors")
    assert found.keys() == before.keys()
    for name, value in found.items():
        if name.removesuffix(".weight") not in shape.quantized:
            assert np.array_equal(value, before[name]), name
            continue
        own, matrix = (each.T if shape.transposed else each for each in (value, before[name]))
        # bitsandbytes makes half precision of it first.
        matrix = matrix.astype(np.float16) if how == INT8 else matrix
        matrix = matrix.astype(np.float64)
        wanted = nearest(matrix, how)
        # Half-way between two either is right.
        off = np.abs(own - wanted) > 1e-6 * np.abs(matrix).max()
        assert off.mean() < 1e-3, name
        assert np.abs(own - matrix)[off].sum() <= 1.001 * np.abs(wanted - matrix)[off].sum()


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shape_tells_what_is_quantised_and_what_it_weighs(bench: Bench, how: Quantization, dtype: str) -> None:
    """Before a weight is loaded it is known which matrices will be packed, which stay, and all bytes to the last."""
    full = read_shape(bench.location.folder)
    shape = quantize_shape(full, how, "the model")
    session = bench.open(dtype=dtype, quantize=how)
    assert set(shape.quantized) == packed(session)
    assert not packed(session) & set(kept_in_full(shape))
    assert weight_bytes(shape, dtype) == measured(session) < weight_bytes(full, dtype)
    if how.bits == 4:
        assert measured(session) < 0.35 * weight_bytes(full, "float32")


@pytest.mark.parametrize("changes", [{}, {"kind": "dora"}, {"kind": "ia3", "rank": 1, "alpha": 1.0}], ids=str)
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_gradients_are_those_on_the_full_weights_it_stands_for(
    bench: Bench, how: Quantization, changes: dict[str, Any], tmp_path: Path
) -> None:
    """On packed weights and on the same unpacked, one adapter has one loss and one gradient of each tensor."""
    target = bench.target(**changes)
    ours, theirs = bench.adapted(target, quantize=how), in_full(bench, tmp_path / "full", quantize=how).adapted(target)
    drawn, wanted = weights(ours), weights(theirs)
    assert {name: value.shape for name, value in drawn.items()} == {name: v.shape for name, v in wanted.items()}
    shake(ours)
    put(theirs, weights(ours))
    (loss, found), (exact, slopes) = accumulated(ours, *batches_of(ROWS, 3)), accumulated(theirs, *batches_of(ROWS, 3))
    # The same sums in the same order: no more than the last bits may differ.
    assert loss == pytest.approx(exact, rel=1e-6)
    assert found.keys() == slopes.keys() == drawn.keys()
    assert min(np.abs(value).max() for value in slopes.values()) > 0
    assert {name: share for name in slopes if (share := apart(found[name], slopes[name])) > 1e-5} == {}
    precise = zip(ours.logits_in_other_precision(PROMPTS), theirs.logits_in_other_precision(PROMPTS), strict=True)
    assert max(apart(mine, other) for mine, other in precise) < 1e-12


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_steps_change_exactly_the_adapter(bench: Bench, kind: Any, how: Quantization) -> None:
    """Training changes every tensor of the adapter, and no byte of packed weights, scales or others."""
    session, plain = bench.adapted(bench.target(kind=kind), quantize=how), bench.open(quantize=how)
    before, declared = session.fingerprints(), session.trainable_names()
    assert sorted(of_base(session).values()) == sorted(plain.fingerprints().values())
    train_a_little(session)
    after = session.fingerprints()
    assert {name for name in before if before[name] != after[name]} == set(declared)
    parts = [name.rsplit(".", 1)[-1] for name in of_base(session)]
    assert parts.count("packed") == parts.count("scales") == CUT[bench.kind, how.bits]
    with session.adapter_disabled():
        assert np.array_equal(all_logits(session), all_logits(plain))


@pytest.mark.parametrize("how", [NF4, INT8], ids=str)
def test_resumed_run_is_the_same_run(bench: Bench, how: Quantization, tmp_path: Path) -> None:
    """Stopped and continued on a base quantised anew, weights, moments and files are the same to the byte."""
    target = bench.target(dropout=0.3)
    session = bench.trained(target, quantize=how)
    session.save_state(tmp_path)
    step(session, batches_of(ROWS, 3))
    again, other = (bench.adapted(target, seed=9, quantize=each) for each in (how, FP4))
    for one in (again, other):
        one.load_state(tmp_path)
        step(one, batches_of(ROWS, 3))
    assert session.fingerprints() == again.fingerprints() != other.fingerprints()
    assert adapter_bytes(session, tmp_path / "0") == adapter_bytes(again, tmp_path / "1")


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_from_disk_is_adapted(bench: Bench, kind: Any, how: Quantization, dtype: str, tmp_path: Path) -> None:
    """Merged into packed weights, or into the same unpacked before: one full model, to the byte, in one dtype."""
    target = bench.kinds()["ia3"] if kind == "ia3" else bench.target(kind=kind)
    ours = bench.adapted(target, quantize=how, dtype=dtype)
    theirs = in_full(bench, tmp_path / "full", quantize=how, dtype=dtype).adapted(target, dtype=dtype)
    shake(ours)
    put(theirs, weights(ours))
    tuned, files = all_logits(ours), []
    for folder, session in ((tmp_path / "0", ours), (tmp_path / "1", theirs)):
        folder.mkdir()
        session.save_model(folder)
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0].keys() == files[1].keys()
    assert {name for name in files[0] if files[0][name] != files[1][name]} <= {"model.safetensors"}
    if (bench.kind, kind) == ("gpt2", "dora"):
        # The lengths of rows are summed in the order in which the layer is stored: the last bit may be another.
        mine, other = (read_tensors(tmp_path / name / "model.safetensors") for name in "01")
        near = {"float32": 1e-6, "bfloat16": 2**-7}[dtype]
        assert {
            name for name, each in mine.items() if apart(each.double().numpy(), other[name].double().numpy()) > near
        } == set()
    else:
        assert files[0] == files[1]
    assert packed(ours)
    assert np.array_equal(all_logits(ours), tuned)
    assert "quantization_config" not in json.loads(files[0]["config.json"])
    merged = bench.at(tmp_path / "0").open(dtype=dtype)
    assert merged.fingerprints().keys() == bench.open().fingerprints().keys()
    if dtype == "float32":
        assert apart(all_logits(merged), tuned) < 1e-5
        assert apart(all_logits(bench.open(quantize=how)), tuned) > 1e-2


@pytest.mark.usefixtures("warm_children")
@pytest.mark.parametrize("how", [NF4, INT8], ids=str)
def test_adapter_in_a_fresh_process_gives_the_same_logits(bench: Bench, how: Quantization, tmp_path: Path) -> None:
    """Without us the logits are the same on a base that is quantised likewise, and others on the full one."""
    session = bench.trained(bench.target(), quantize=how)
    adapter_bytes(session, tmp_path / "saved")
    asked: dict[str, Any] = {"prompts": PROMPTS, "dtype": "float32"}
    found, other = (
        check_reload("torch", session, bench.location, tmp_path / "saved", quantize=each, **asked)
        for each in (how, None)
    )
    assert found.difference <= found.allowed < found.difference_from_base / 10
    assert other.difference > 10 * other.allowed
    again = bench.open(quantize=how)
    again.load_adapter(tmp_path / "saved")
    assert np.array_equal(all_logits(again), all_logits(session))
    assert again.trainable_names() == []


QLORA = """
import sys, numpy, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

base, adapter, logits = sys.argv[1:4]
how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
opening = {"dtype": torch.float32, "quantization_config": how, "device_map": {"": "cpu"}}
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **opening), adapter).train()
assert "bnb" in type(model.base_model.model.model.layers[0].self_attn.q_proj).__module__
with torch.no_grad():
    said = [model(input_ids=torch.tensor([[int(id) for id in ids.split()]])).logits[0].numpy() for ids in sys.argv[4:]]
numpy.save(logits, numpy.concatenate(said))
"""
"""What users of PEFT write: nothing of ours in it. At rest bitsandbytes' layers on a CPU would round to bfloat16."""


WITH_KERNELS = """
import sys
sys.path.insert(0, sys.argv[1])
import kernels, torch
from pathlib import Path
from finetune.backends.torch.packed import quantizing
from finetune.records import Quantization
quantizing(Path(sys.argv[2]), Quantization(4, 64, "nf4"), torch.float32, "here")
import bitsandbytes
assert sys.modules["kernels"] is kernels
"""


def test_library_runs_no_code_of_the_hub(llama: Bench, tmp_path: Path) -> None:
    """Where `kernels` is installed, bitsandbytes fetches code from the hub and runs it as it is imported: not here."""
    fetches = "def get_kernel(*given, **named):\n    open(__file__ + '.ran', 'w').close()\n"
    (tmp_path / "kernels.py").write_text(fetches)
    words = [sys.executable, "-c", WITH_KERNELS, str(tmp_path), str(llama.location.folder)]
    subprocess.run(words, check=True, timeout=300)
    assert not (tmp_path / "kernels.py.ran").exists()


def test_saved_adapter_is_one_of_pefts_own_qlora(tmp_path: Path) -> None:
    """It names its base, and with PEFT alone it has the same logits on bitsandbytes' own layers."""
    sizes = {**SIZES["llama"], "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    even = make_model("torch-llama", tmp_path / "even", **sizes)
    session = even.trained(quantize=NF4)
    adapter_bytes(session, tmp_path / "saved")
    told = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == public_name(even.location)
    places = [even.location.folder, tmp_path / "saved", tmp_path / "logits.npy"]
    asked = [" ".join(map(str, ids)) for ids in PROMPTS]
    subprocess.run([sys.executable, "-c", QLORA, *map(str, places), *asked], check=True, timeout=120)
    assert apart(np.load(tmp_path / "logits.npy"), all_logits(session)) < 1e-5


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.2}, {"again": True}, {"dtype": "bfloat16"}], ids=str)
def test_live_tensors_are_as_counted(bench: Bench, how: Quantization, changes: dict[str, Any]) -> None:
    """Live tensors peak within 15% of the forecast, and what packing spares is what it says, but for one matrix."""
    again, dtype = changes.get("again", False), changes.get("dtype", "float32")
    target = bench.target(dropout=changes.get("dropout", 0.0))
    batch, full = Batch(make_rows(40)), read_shape(bench.location.folder)
    told, peaks = [], []
    for shape, quantize in ((full, None), (quantize_shape(full, how, "the model"), how)):
        optimization = Optimization(0.0, 1.0, gradient_checkpointing=again)
        session = bench.adapted(target, optimization=optimization, dtype=dtype, quantize=quantize)
        session.accumulate(batch, 1 / batch.target_count)
        session.update(1e-4)
        load = load_of([batch], recomputed=again)
        told.append(forecast_memory(shape, target, dtype, load, FRAMEWORKS["torch"]).expected.tensors)
        peaks.append(peak_tensors(session, batch))
    if not again:  # which is told to take a fifth more where few layers have an adapter, on full weights, too
        assert told[1] == pytest.approx(peaks[1], rel=0.15)
    matrix = 4 * full.hidden_size * full.intermediate_size
    assert told[0] - told[1] == pytest.approx(peaks[0] - peaks[1], abs=matrix)
    assert peaks[0] - peaks[1] > matrix


@pytest.mark.usefixtures("warm_children")
def test_run_says_what_it_was_trained_on_and_goes_on_to_the_same_byte(tmp_path: Path) -> None:
    """A run on a packed base tells how it is held; killed and resumed, or opened again, it is on the same base."""
    model = tmp_path / "model"
    shutil.copytree(tokenizer_folder(KINDS[0]), model)
    words = json.loads((model / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    open_backend("reference").create({**LLAMA, **sizes, "vocab_size": words}, model, 3)
    overrides = {
        **QUICK,
        "backend": "torch",
        "model.path": str(model),
        "model.quantize": "4bit",
        "data.train": str(make_data(tmp_path / "rows.jsonl", 6)),
        "training.max_steps": 4,
        "training.save_every": 2,
        "adapter.dropout": 0.2,
        "judge.memory": "always",
    }
    loaded = load_config(None, environ={}, overrides=overrides, profile=None)

    def dies(event: Event) -> None:
        if isinstance(event, CheckpointSaved):
            raise Death

    record = pipeline.fine_tune(loaded, output=tmp_path / "whole")[1]
    with pytest.raises(Death):
        pipeline.fine_tune(loaded, output=tmp_path / "killed", listener=dies)
    again = resume(tmp_path / "killed")
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed")
    ]
    assert adapters[0] == adapters[1]
    assert [step["loss"] for step in again["losses"]["train"]] == [step["loss"] for step in record["losses"]["train"]]
    session = Bench("torch", ModelLocation("model", model, "local")).open(quantize=NF4)
    assert record["model"]["quantization"] == {
        "where": "load",
        "how": "4 bits (nf4) in groups of 64",
        "quantized": 7,
        "in_full": ["lm_head", "model.embed_tokens"],
        "weight_bytes": measured(session),
    }
    assert "it cannot be fully fine-tuned" in record["not_measured"]["memory"]
    assert record["reload"]["difference"] <= record["reload"]["allowed"] < record["reload"]["difference_from_base"]
    prepared, opened = reopen(tmp_path / "whole")
    base, tuned = compare(session=opened, prepared=prepared)
    told = [look["loss"] for look in record["losses"]["fixed"]]
    assert [base.fixed[0], tuned.fixed[0]] == pytest.approx([told[0], told[-1]], rel=1e-6)


def test_what_cannot_be_quantised_is_refused(llama: Bench, tmp_path: Path) -> None:
    """Refused are groups that bitsandbytes does not have, rows that divide into none, files in its form, and FSDP."""
    for how, words in ((Quantization(4, 32, "nf4"), "in groups of 64"), (Quantization(8, 32, "int8"), "for each row")):
        with pytest.raises(ModelError, match=words) as caught:
            llama.open(quantize=how)
        assert caught.value.hint == "leave out model.quantize_group_size"
    odd = make_model("torch-llama", tmp_path / "odd")
    with pytest.raises(ModelError, match="no matrix") as caught:
        odd.open(quantize=NF4)
    assert caught.value.hint == "set model.quantize to 8bit, or leave it out"
    changed_settings("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})(
        odd.location.folder
    )
    with pytest.raises(ModelError, match="quantised by bitsandbytes"):
        read_shape(odd.location.folder)
    with pytest.raises(ModelError, match="trains on full weights"):
        odd.open()
    with pytest.raises(RefusedError, match="FSDP shares out full weights"):
        shard(llama.open(quantize=NF4).model)
