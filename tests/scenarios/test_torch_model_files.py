"""Laws of the torch backend towards a model's files: nothing in them is run, what does not fit is refused."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.errors import ModelError, OutOfMemoryError
from finetune.evidence.reload import check_reload
from support.sessions import Bench, adapter_bytes, make_model, need

need("torch")

pytestmark = pytest.mark.tier2
OWN_CODE = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A tiny Llama."""
    return make_model("torch-llama", tmp_path_factory.mktemp("llama"))


def changed(bench: Bench, folder: Path, **changes: Any) -> Bench:
    """The same files with other settings; None leaves one out."""
    shutil.copytree(bench.location.folder, folder)
    settings = {**json.loads((folder / "config.json").read_text()), **changes}
    kept = {key: value for key, value in settings.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return bench.at(folder)


class Bomb:
    """Tells that it was unpickled, by a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def arm(folder: Path, trace: Path) -> None:
    """Put into a model's folder all that other tools would run: code of its own, of its answers, and pickles."""
    told = f"open({str(trace)!r}, 'w').close()\n"
    (folder / "own.py").write_text(
        f"{told}from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel\n"
    )
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"{told}def generate(*given, **named): raise SystemExit\n")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb(trace)))


def test_code_of_a_model_is_never_run(llama: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code and pickles in a model's folder stay data, known architecture or not, and nobody is asked to allow them."""
    asked: list[str] = []

    def agree(prompt: str = "") -> str:
        asked.append(prompt)
        return "y"

    monkeypatch.setattr("builtins.input", agree)
    trace = tmp_path / "trace"
    known = changed(llama, tmp_path / "known", auto_map=OWN_CODE)
    unknown = changed(llama, tmp_path / "unknown", auto_map=OWN_CODE, model_type="wizardry")
    # transformers knows the architecture, but no causal language model of it: only the model's own code has one.
    another = changed(llama, tmp_path / "another", auto_map=OWN_CODE, model_type="t5")
    for each in (known, unknown, another):
        arm(each.location.folder, trace)
    session = known.adapted()
    assert session.generate([[5, 6]], 2, [2])
    adapter_bytes(session, tmp_path / "adapter")
    arm(tmp_path / "adapter", trace)
    known.open().load_adapter(tmp_path / "adapter")
    check_reload("torch", session, known.location, tmp_path / "adapter", prompts=[[5, 6]], dtype="float32")
    with pytest.raises(ModelError, match=r"model_type 'wizardry' .* code of its own, and that is never run"):
        unknown.open()
    with pytest.raises(ModelError, match="cannot be loaded"):
        another.open()
    assert not asked
    assert not trace.exists()


def test_model_of_pickles_alone_is_refused(llama: Bench, tmp_path: Path) -> None:
    """Where the weights that would be read are pickled, the model is refused and they are not."""
    bench = changed(llama, tmp_path / "pickled")
    (bench.location.folder / "model.safetensors").rename(bench.location.folder / "other.safetensors")
    arm(bench.location.folder, tmp_path / "trace")
    with pytest.raises(ModelError, match=r"no file named model\.safetensors"):
        bench.open()
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "flash_attention_2"},
        {"experts_implementation": "somebody/kernel"},
        {"text_config": {"attn_implementation": {"": "somebody/kernel"}}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_kernels_from_elsewhere_are_refused(llama: Bench, tmp_path: Path, changes: dict[str, Any]) -> None:
    """A config that names what is to compute its layers is refused with that name: it would be fetched and run."""
    with pytest.raises(ModelError, match=r"_implementation .*(somebody/kernel|flash_attention_2)"):
        changed(llama, tmp_path / "model", **changes).open()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "lama"}, r"does not know: model_type 'lama'[\s\S]*llama"),
        ({"model_type": None}, "does not know: model_type None"),
        ({"num_attention_heads": 0}, "modulo by zero"),
        ({"head_dim": None, "num_attention_heads": 4}, "21.* is not a multiple of the number of attention heads .4"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"hidden_size": -21}, "-21"),
        ({"hidden_act": "wizardry"}, "wizardry"),
        ({"num_hidden_layers": 1}, r"no place for 9 of its weights, first model\.layers\.1"),
        ({"num_hidden_layers": 3}, r"lacks 9 weights, among them model\.layers\.2"),
        ({"intermediate_size": 30}, r"mlp\.\w+\.weight is \(2., 2.\), its config says \((30, 21|21, 30)\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_that_does_not_fit_is_refused(llama: Bench, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    """Settings that are none, that do not go together, or that the weights do not bear out are refused and named."""
    with pytest.raises(ModelError, match=said) as caught:
        changed(llama, tmp_path / "model", **changes).open()
    assert caught.value.hint


def test_weights_left_by_older_files_are_no_reason_to_refuse(llama: Bench, tmp_path: Path) -> None:
    """Frequencies and masks that old files carry are no weights, and do not keep a model from loading."""
    bench = changed(llama, tmp_path / "old")
    path = bench.location.folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"][:3].copy()
    tensors["model.layers.0.self_attn.masked_bias"] = tensors["model.norm.weight"][:1].copy()
    save_file(tensors, path, {"format": "pt"})
    assert bench.open().fingerprints() == llama.open().fingerprints()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("damage", ["dropped", "reshaped", "cut off", "unknown"])
def test_base_without_a_weight_is_refused(kind: str, damage: str, tmp_path: Path) -> None:
    """A base from which a weight is missing, or whose file is cut off, is refused: no weight is ever made up."""
    bench, path = make_model(f"torch-{kind}", tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = max(key for key in tensors if "layers.1" in key or "h.1." in key)
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "unknown":
        (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    else:
        tensors[name] = np.zeros(13, np.float32)
        save_file({key: value for key, value in tensors.items() if key != name or damage == "reshaped"}, path)
    with pytest.raises(ModelError, match=str(tmp_path) if damage in ("cut off", "unknown") else "lacks|cannot be"):
        bench.open()


def test_out_of_memory_while_loading_is_no_fault_of_the_files(llama: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory runs out as the weights are loaded, that is said, and not that the model is broken."""
    import transformers

    def fail(*given: Any, **named: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(OutOfMemoryError, match="out of memory while model"):
        llama.open()
