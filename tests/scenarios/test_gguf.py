"""GGUF files are what was trained, as llama.cpp computes them; one that is not is told and kept apart."""

import dataclasses
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")
pytest.importorskip("xllamacpp", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")

import gguf
import numpy as np

from finetune.adapters.peft_files import WEIGHTS, read_settings
from finetune.backends import open_backend
from finetune.chat.tokenizer import FileTokenizer
from finetune.errors import EvidenceError, ExportError, FineTuneError
from finetune.export import gguf as exporting
from finetune.export.blueprint import Blueprint, Tensor
from finetune.export.corpus import nasty_texts
from finetune.export.gguf import ExportedFile, write_exportable
from finetune.export.gguf_source import Exportable
from finetune.export.llama_cpp import Questions, ask_llama_cpp
from finetune.export.outtypes import BLOCKS, FILE_TYPES, OUTTYPES, Outtype, Storage
from finetune.export.pre_tokenizer import NAMES
from finetune.export.quantise import chunk_quantiser, quantise
from finetune.export.read_back import read_back, rounding
from finetune.export.sources import AdapterWeights
from finetune.export.vocabulary import describe_vocabulary
from finetune.export.write import write_gguf
from finetune.models.locate import SHIPPED, locate_model
from finetune.records import AdapterTarget, ModelLocation, Optimization
from support.gguf_models import CONFIGS, PIECES, byte_level, exportable, give_tokenizer, gpt2_like, make_model
from support.processes import ft
from support.sessions import batches_of, make_rows, step

ASKED = ["token ids", "logits", "greedy text"]
STAGES = ["file", *ASKED]
QUANTISED_STAGES = ["file", *(f"{stage} before quantising" for stage in ASKED), *ASKED]
SHIPPED_AS: list[tuple[str, Outtype]] = [
    ("reference-llama", "f16"),
    ("reference-llama", "bf16"),
    ("reference-llama", "q8_0"),
    ("reference-gpt2", "f16"),
    ("reference-llama", "q6_k"),
    ("reference-llama", "q5_k_m"),
    ("reference-llama", "q4_k_m"),
]


def stages(done: ExportedFile) -> list[str]:
    """The stages that were gone through, each of which holds."""
    assert all(check.passed for check in done.checks)
    return [check.stage for check in done.checks]


@pytest.mark.parametrize("kind", CONFIGS)
def test_gguf_of_every_family_is_the_model(kind: str, tmp_path: Path) -> None:
    """Of each of 16 models of nine families llama.cpp makes the same tokens and logits, and says the same.

    Among them are all 8 pre-tokenizers that can be read from tokenizer.json, and both kinds of pieces.
    """
    assert (len(CONFIGS), len(NAMES)) == (16, 8)
    assert len([each for each in CONFIGS if each not in PIECES]) >= len(NAMES)
    folder = make_model(kind, tmp_path / "model")
    name = give_tokenizer(kind, folder)
    done = write_exportable(exportable(folder), tmp_path / "model.gguf", "f32")
    assert stages(done) == STAGES
    assert done.tensors.keys() == {"f32"}
    assert gguf.GGUFReader(done.path).fields["tokenizer.ggml.pre"].contents() == name


@pytest.mark.parametrize(("name", "outtype"), SHIPPED_AS)
def test_gguf_of_shipped_models_is_within_each_type(name: str, outtype: Outtype, tmp_path: Path) -> None:
    """The shipped models pass in each of 6 smaller types, and in f16 no greedy token differs."""
    assert {outtype for _, outtype in SHIPPED_AS} == set(OUTTYPES) - {"f32"}
    done = write_exportable(exportable(name), tmp_path / "model.gguf", outtype)
    assert stages(done) == QUANTISED_STAGES
    if outtype == "f16":
        assert done.checks[-1].measured.startswith("5 of 5 equal, 0 diverge")


WIDE = {
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "head_dim": 64,
    "initializer_range": 0.06,
}
WIDE_GPT2 = {"n_embd": 256, "n_head": 8, "n_inner": 512, "n_layer": 3, "initializer_range": 0.06}
MIXES: dict[tuple[str, Outtype], set[Storage]] = {
    ("llama", "q6_k"): {"f32", "q6_k"},
    ("llama", "q5_k_m"): {"f32", "q5_k", "q6_k"},
    ("llama", "q4_k_m"): {"f32", "q4_k", "q6_k"},
    ("gemma", "q4_k_m"): {"f32", "q4_k", "q6_k"},
    ("gpt2", "q4_k_m"): {"f32", "q4_k", "q5_k", "q6_k"},
}
"""Which types a file has in which rows are whole blocks."""


@pytest.mark.parametrize(("kind", "outtype"), MIXES)
def test_gguf_in_blocks_of_256_is_within_each_type(kind: str, outtype: Outtype, tmp_path: Path) -> None:
    """Models with rows of whole blocks pass in the types that llama.cpp's own quantiser makes, mixed as it does."""
    folder = make_model(kind, tmp_path / "model", **(WIDE_GPT2 if kind == "gpt2" else WIDE))
    gpt2_like(folder)
    done = write_exportable(exportable(folder), tmp_path / "model.gguf", outtype)
    assert stages(done) == QUANTISED_STAGES
    assert done.tensors.keys() == MIXES[kind, outtype]
    assert gguf.GGUFReader(done.path).fields["general.file_type"].contents() == FILE_TYPES[outtype]


TARGETS = {
    "lora": AdapterTarget(3, 7.0, 0.0, ("q_proj", "k_proj", "v_proj", "down_proj")),
    "rank-stabilized": AdapterTarget(4, 3.0, 0.0, ("q_proj", "k_proj"), scaling="rank_stabilized"),
    "patterns": AdapterTarget(
        2, 4.0, 0.0, ("k_proj", "up_proj"), rank_pattern={"k_proj": 5}, alpha_pattern={"layers.1.mlp.up_proj": 9.0}
    ),
    "dora": AdapterTarget(2, 5.0, 0.0, ("q_proj", "o_proj"), kind="dora"),
    "saved": AdapterTarget(2, 5.0, 0.0, ("k_proj",), saved=("lm_head", "model.norm")),
    "gpt2": AdapterTarget(3, 7.0, 0.0, ("c_attn", "c_proj")),
    "gpt2 dora": AdapterTarget(3, 7.0, 0.0, ("c_attn", "c_fc"), kind="dora"),
}
ALONE = {"lora", "rank-stabilized", "patterns", "gpt2"}


@pytest.mark.parametrize("kind", TARGETS)
def test_gguf_of_an_adapter_is_what_was_trained(kind: str, tmp_path: Path) -> None:
    """Each of 7 adapters, merged or alone, gives what the trainer computes with it; what cannot stand alone is told."""
    target = TARGETS[kind]
    folder = make_model("gpt2" if kind.startswith("gpt2") else "llama", tmp_path / "model")
    gpt2_like(folder)
    session = open_backend("torch").open(ModelLocation("x", folder, "local"), "float32", 0)
    session.attach(target, 1)
    session.prepare_updates(Optimization(0.0, 1.0))
    for number in range(3):
        step(session, batches_of(make_rows(4, seed=number), 2), 0.03)
    (tmp_path / "adapter").mkdir()
    session.save_adapter(tmp_path / "adapter")
    settings = read_settings(tmp_path / "adapter", transposed=kind.startswith("gpt2"))
    adapter = AdapterWeights(tmp_path / "adapter" / WEIGHTS, settings)
    tuned = dataclasses.replace(exportable(folder), adapter=adapter, open=lambda: session)
    assert stages(write_exportable(tuned, tmp_path / "merged.gguf", "f32")) == STAGES
    if kind == "saved":  # the smallest change: the base is told from it all the same
        with pytest.raises(ExportError, match="'logits'"):
            write_exportable(dataclasses.replace(tuned, adapter=None), tmp_path / "base.gguf", "f32")
    if kind in ALONE:
        with pytest.raises(FineTuneError, match="is not written as q6_k"):
            write_exportable(tuned, tmp_path / "alone.gguf", "q6_k", adapter_only=True)
        done = write_exportable(tuned, tmp_path / "alone.gguf", "f32", adapter_only=True)
        assert stages(done) == STAGES
        names = {tensor.name.rsplit(".", 1)[-1] for tensor in gguf.GGUFReader(done.path).tensors}
        assert names == {"lora_a", "lora_b"}
    else:
        with pytest.raises(FineTuneError, match="alone cannot hold"):
            write_exportable(tuned, tmp_path / "alone.gguf", "f32", adapter_only=True)


@pytest.mark.parametrize("name", SHIPPED)
def test_gguf_tokenizer_cuts_ten_thousand_texts_alike(name: str, tmp_path: Path) -> None:
    """Of 10,000 generated texts llama.cpp makes the same ids as the trainer, as plain text and as markup."""
    done = write_exportable(exportable(name), tmp_path / "model.gguf", "f16")
    tokenizer = FileTokenizer(locate_model(name).folder)
    added = [token["content"] for token in tokenizer.description()["added_tokens"]]
    texts = nasty_texts(added, drawn=12_000)[:10_000]
    assert len(set(texts)) == 10_000
    told = ask_llama_cpp(done.path, Questions(texts, [], [], 1, 64, 0))
    for own, theirs in ((tokenizer.encode_content, told.plain), (tokenizer.encode_markup, told.markup)):
        assert [text for text, ids in zip(texts, theirs, strict=True) if tuple(own(text)) != ids] == []


def _other_family(**changes: Any) -> Callable[[Exportable], Exportable]:
    def change(made: Exportable) -> Exportable:
        family = dataclasses.replace(made.described.family, **changes)
        return dataclasses.replace(made, described=dataclasses.replace(made.described, family=family))

    return change


def _other_key(key: str, value: Any) -> Callable[[Exportable], Exportable]:
    def change(made: Exportable) -> Exportable:
        assert made.described.metadata[key] != value
        made.described.metadata[key] = value
        return made

    return change


def _same(made: Exportable) -> Exportable:
    return made


def _wrong_pre(described: Any) -> Any:
    return dataclasses.replace(described, metadata=described.metadata | {"tokenizer.ggml.pre": "qwen2"})


def _without_bos(described: Any) -> Any:
    return dataclasses.replace(described, metadata=described.metadata | {"tokenizer.ggml.add_bos_token": False})


def _one_weight_off(path: Path) -> None:
    reader = gguf.GGUFReader(path, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
    tensor.data[3, 5] += 0.01
    reader.data.flush()


def _loaded(name: str, change: Callable[[Any], Any]) -> Callable[[Exportable], Exportable]:
    """The source whose weight of this name is another: what a wrong converter would write, and read again as right."""

    def changed(made: Exportable) -> Exportable:
        read = made.base.read
        made.base.read = lambda asked: change(read(asked)) if asked == name else read(asked)  # type: ignore[method-assign]
        return made

    return changed


def _heads_swapped(weight: Any) -> Any:
    return np.concatenate((weight[10:20], weight[:10], weight[20:]))


LAYER = "model.layers.1."
FAULTS: dict[str, tuple[str, str, Any]] = {
    "two heads swapped": ("logits", "made", _loaded(f"{LAYER}self_attn.q_proj.weight", _heads_swapped)),
    "one tensor off by 1%": ("logits", "made", _loaded(f"{LAYER}mlp.up_proj.weight", lambda weight: weight * 1.01)),
    "no permutation (A220)": ("logits", "made", _other_family(permuted=False)),
    "rope base lost (A223)": ("logits", "made", _other_key("llama.rope.freq_base", 500_000.0)),
    "epsilon lost": ("logits", "made", _other_key("llama.attention.layer_norm_rms_epsilon", 1e-6)),
    "pre-tokenizer guessed (A222)": ("token ids", "vocabulary", _wrong_pre),
    "add_bos lost (A224)": ("token ids", "vocabulary", _without_bos),
    "a weight off by little": ("file", "file", _one_weight_off),
    "cut off": ("file", "file", lambda path: os.truncate(path, path.stat().st_size // 2)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_gguf_that_is_not_the_model_is_told_and_kept_as_refused(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 9 faults is found at the first stage where it shows; the file has its name, and a report of it, nowhere.

    It is kept under a name that says so, beside what was found.
    """
    stage, where, change = FAULTS[fault]
    folder = make_model("llama", tmp_path / "model")
    gpt2_like(folder)
    made = exportable(folder)
    if where == "made":
        made = change(made)
    elif where == "vocabulary":
        monkeypatch.setattr(exporting, "describe_vocabulary", lambda *told: change(describe_vocabulary(*told)))
    else:
        write = exporting.write_gguf
        monkeypatch.setattr(exporting, "write_gguf", lambda plan, path: (write(plan, path), change(path)))
    with pytest.raises(ExportError, match=f"at the stage '{stage}'"):
        write_exportable(made, tmp_path / "out" / "model.gguf", "f32")
    kept = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert kept == ["model.refused.gguf", "model.refused.json"]
    told = json.loads((tmp_path / "out" / "model.refused.json").read_text(encoding="utf-8"))
    assert [check["stage"] for check in told["checks"] if check["first"]] == [stage]


PLANTED: dict[str, Any] = {
    "wrong permutation": _other_family(permuted=False),
    "two heads swapped": _loaded(f"{LAYER}self_attn.q_proj.weight", lambda each: np.roll(each, 28, axis=0)),
    "one tensor off by 1%": _loaded(f"{LAYER}mlp.up_proj.weight", lambda weight: weight * 1.01),
}


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("fault", PLANTED)
def test_no_type_is_so_coarse_that_a_fault_hides_behind_it(fault: str, outtype: Outtype, tmp_path: Path) -> None:
    """Of a shipped model each of 3 faults of the conversion is told in every smaller type: in float32, beforehand."""
    with pytest.raises(ExportError, match="at the stage 'logits before quantising'"):
        write_exportable(PLANTED[fault](exportable(SHIPPED[0])), tmp_path / "model.gguf", outtype)
    assert (tmp_path / "model.refused.gguf").exists()


def test_gguf_weight_too_large_for_its_type_is_refused(tmp_path: Path) -> None:
    """A weight above what f16 holds is named and refused in f16, and written in bf16."""
    from safetensors.numpy import load_file, save_file

    folder = make_model("llama", tmp_path / "model")
    gpt2_like(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = 7e4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FineTuneError, match=r"blk\.1\.ffn_down\.weight holds 70000"):
        write_exportable(exportable(folder), tmp_path / "model.gguf", "f16")
    assert stages(write_exportable(exportable(folder), tmp_path / "model.gguf", "bf16")) == QUANTISED_STAGES


def test_gguf_list_that_would_be_empty_is_refused(tmp_path: Path) -> None:
    """A tokenizer without merges: GGUF has no empty list, and no file is begun."""
    with pytest.raises(FineTuneError, match=r"tokenizer\.ggml\.merges would be an empty list"):
        write_gguf(Blueprint("llama", {"tokenizer.ggml.merges": []}, ()), tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_llama_cpp_says_why_it_cannot_load(tmp_path: Path) -> None:
    """A file that is cut off, and one that is none, end in an error with llama.cpp's own words."""
    done = write_exportable(exportable(SHIPPED[0]), tmp_path / "model.gguf", "f16")
    os.truncate(done.path, 200_000)
    (tmp_path / "none.gguf").write_bytes(b"GGUF")
    for path in (done.path, tmp_path / "none.gguf"):
        with pytest.raises(EvidenceError, match=r"llama\.cpp cannot load it: .*(bounds|corrupt|read|fail)"):
            ask_llama_cpp(path, Questions([], [], [], 1, 64, 0))


def test_gguf_fault_is_not_hidden_by_quantising(tmp_path: Path) -> None:
    """A wrong key that changes less than quantising does is found all the same; a model that bears it badly is told."""
    folder = make_model("llama", tmp_path / "model", **WIDE)
    gpt2_like(folder)
    wrong = _other_key("llama.attention.layer_norm_rms_epsilon", 1.2e-3)(exportable(folder))
    with pytest.raises(ExportError, match="at the stage 'logits before quantising'"):
        write_exportable(wrong, tmp_path / "wrong.gguf", "q4_k_m")
    restless = make_model("llama", tmp_path / "restless", **WIDE | {"initializer_range": 0.3})
    gpt2_like(restless)
    with pytest.raises(ExportError, match=r"at the stage 'logits' .*\n.*use a larger --outtype"):
        write_exportable(exportable(restless), tmp_path / "restless.gguf", "q4_k_m")
    assert {path.name for path in tmp_path.glob("*.gguf")} == {"wrong.refused.gguf", "restless.refused.gguf"}


@pytest.mark.parametrize("storage", BLOCKS)
def test_what_is_read_back_is_held_to_its_type_bit_for_bit(storage: Storage, tmp_path: Path) -> None:
    """A tensor of any type that is off by 1%, less than most types round, is refused by name."""
    assert (BLOCKS[storage].weights, BLOCKS[storage].bytes) == gguf.GGML_QUANT_SIZES[kind_of_storage(storage)]
    weight = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    plan = Blueprint("llama", {}, (Tensor("blk.0.ffn_up.weight", weight.shape, storage, lambda: weight),))
    write_gguf(plan, tmp_path / "right.gguf")
    assert read_back(plan, tmp_path / "right.gguf").passed
    off = Blueprint("llama", {}, (Tensor("blk.0.ffn_up.weight", weight.shape, storage, lambda: weight * 1.01),))
    write_gguf(off, tmp_path / "off.gguf")
    assert "blk.0.ffn_up.weight is off by" in read_back(plan, tmp_path / "off.gguf").first


@pytest.mark.parametrize("storage", ["f16", "bf16"])
def test_rounding_is_half_a_step_of_the_type(storage: Storage) -> None:
    """Weights of all sizes, stored and read again, are off by no more than is allowed, and some by near all of it."""
    dice = np.random.default_rng(0)
    weights = (dice.standard_normal((64, 256)) * 10.0 ** dice.integers(-6, 4, (64, 256))).astype(np.float32)
    back = gguf.dequantize(quantise(weights, storage), kind_of_storage(storage)).reshape(weights.shape)
    share = np.abs(back - weights) / rounding(weights, storage)
    assert 0.9 < share.max() <= 1.0


def kind_of_storage(storage: Storage) -> Any:
    """Gguf's name of a type."""
    return gguf.GGMLQuantizationType[storage.upper()]


def test_llama_cpps_quantiser_agrees_with_gguf() -> None:
    """q8_0, which both make, is byte for byte the same: the library is called as it is meant to be."""
    weights = np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    made = np.empty((3, 96 // 32 * 34), np.uint8)
    chunk_quantiser()(int(kind), weights.ctypes.data, made.ctypes.data, 0, 3, 96, None)
    assert made.tobytes() == gguf.quantize(weights, kind).tobytes()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short finished run."""
    folder = tmp_path_factory.mktemp("export")
    quick = ["judge.control=never", "judge.memory=never", "training.max_steps=10"]
    done = ft("train", "--output", "run", *(word for key in quick for word in ("--set", key)), cwd=folder)
    assert done.returncode in (0, 1, 4), done.stderr
    return folder / "run"


def test_export_of_a_run(run: Path) -> None:
    """`ft export RUN` writes below the run, once; its questions are asked again; its origin stands in the file."""
    done = ft("export", "run", "--json", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["file"] == "run/gguf/run-f16.gguf"
    assert [check["stage"] for check in told["checks"]] == QUANTISED_STAGES
    assert "of 13 equal" in told["checks"][-1]["measured"]  # 8 questions of the run, 5 prompts of every model
    fields = gguf.GGUFReader(run.parent / told["file"]).fields
    manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert fields["general.base_model.0.name"].contents() == "reference-llama"
    assert fields["general.finetune"].contents() == manifest["id"]
    assert fields["general.dataset.0.name"].contents() == Path(manifest["data"]["files"][0]["path"]).name
    assert fields["general.license"].contents()
    template = (run / "adapter" / "chat_template.jinja").read_text(encoding="utf-8")
    assert fields["tokenizer.chat_template"].contents() == template
    again = ft("export", "run", cwd=run.parent)
    assert (again.returncode, "exists already" in again.stderr) == (3, True)


def test_export_refuses_before_it_writes(run: Path, tmp_path: Path) -> None:
    """Each of 5 mistakes ends with its exit code, and the remedy, and no file."""
    folder = make_model("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}), encoding="utf-8")
    shutil.copytree(run, tmp_path / "changed", ignore=shutil.ignore_patterns("*.gguf"))
    (tmp_path / "changed" / "adapter" / WEIGHTS).write_bytes(b"")
    cases = {
        ("export", str(run), "--outtype", "iq2_xs"): (2, "llama-quantize"),
        ("export", str(folder)): (3, "'mamba' cannot be written as GGUF"),
        ("export", "nothing-here/at/all"): (3, "does not exist"),
        ("export", "changed"): (3, "is not the one that was trained"),
        ("export", "reference-gpt2", "--adapter-only"): (3, "no adapter"),
    }
    for arguments, (code, words) in cases.items():
        done = ft(*arguments, cwd=tmp_path)
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    assert list(tmp_path.rglob("*.gguf*")) == []


def test_export_refuses_before_a_framework_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever names no model, none that can be written, or no backend, does not wait for torch."""
    monkeypatch.setattr(exporting, "open_backend", lambda name: pytest.fail(f"{name} is opened"))
    folder = make_model("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}), encoding="utf-8")
    for source, backend, words in (
        ("nothing-here/at/all", "torch", "does not exist"),
        (str(folder), "torch", "'mamba' cannot be written as GGUF"),
        ("reference-llama", "nobody", "backend 'nobody' is not in this version"),
    ):
        with pytest.raises(FineTuneError, match=words):
            exporting.export(
                source, outtype=None, adapter_only=False, output=tmp_path / "x.gguf", backend=backend, tell=print
            )
    assert not (tmp_path / "x.gguf").exists()


def test_export_asked_for_at_training_is_seen_to_first(tmp_path: Path) -> None:
    """`ft train --export` refuses a base that cannot be written as GGUF before a run begins; else the file is there."""
    folder = make_model("llama", tmp_path / "model")
    byte_level(folder, (r"\w+",))
    quick = ["--set=judge.control=never", "--set=judge.memory=never", "--set=training.max_steps=2", "--output=run"]
    cases = {
        ("--model", str(folder), "--export", "f16"): (3, "no pre-tokenizer of llama.cpp cuts text at"),
        ("--export", "q3"): (2, "--export 'q3' is not in this version"),
    }
    for arguments, (code, words) in cases.items():
        refused = ft("train", *quick, *arguments, cwd=tmp_path)
        assert (refused.returncode, words in refused.stderr) == (code, True), refused.stderr
        assert not (tmp_path / "run").exists()
    done = ft("train", *quick, "--export", "q8_0", cwd=tmp_path)
    assert done.returncode in (0, 1, 4), done.stderr
    assert [path.name for path in (tmp_path / "run" / "gguf").iterdir()] == ["run-q8_0.gguf"]


def test_export_on_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """Where the file finds no room, the error says so with exit code 1, and no part of it is left."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = ft("export", "reference-llama", "--output", "model.gguf", cwd=tmp_path, limit=limit)
    assert done.returncode == 1
    assert "cannot write model.gguf" in done.stderr
    assert list(tmp_path.iterdir()) == []
