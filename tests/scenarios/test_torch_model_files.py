"""Laws of the torch backend towards a model's files: nothing in them is run, what does not fit is refused."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")

from safetensors.torch import load_file, save_file

from finetune.errors import ModelError
from finetune.evidence.reload import check_reload
from finetune.records import ModelLocation
from support.tiny_models import adapted, adapter_bytes, make_model, open_session

pytestmark = pytest.mark.tier2
OWN_CODE = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelLocation:
    """A tiny Llama."""
    return make_model("llama", tmp_path_factory.mktemp("llama"))


def changed(location: ModelLocation, folder: Path, **changes: Any) -> ModelLocation:
    """The same files with other settings; None leaves one out."""
    shutil.copytree(location.folder, folder)
    settings = {**json.loads((folder / "config.json").read_text()), **changes}
    kept = {key: value for key, value in settings.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return ModelLocation(location.name, folder, "local")


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


def test_code_of_a_model_is_never_run(llama: ModelLocation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        arm(each.folder, trace)
    session = adapted(known)
    assert session.generate([[5, 6]], 2, [2])
    adapter_bytes(session, tmp_path / "adapter")
    arm(tmp_path / "adapter", trace)
    open_session(known).load_adapter(tmp_path / "adapter")
    check_reload("torch", session, known, tmp_path / "adapter", prompts=[[5, 6]], dtype="float32")
    with pytest.raises(ModelError, match=r"model_type 'wizardry' .* code of its own, and that is never run"):
        open_session(unknown)
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_session(another)
    assert not asked
    assert not trace.exists()


def test_model_of_pickles_alone_is_refused(llama: ModelLocation, tmp_path: Path) -> None:
    """Where the weights that would be read are pickled, the model is refused and they are not."""
    location = changed(llama, tmp_path / "pickled")
    (location.folder / "model.safetensors").rename(location.folder / "other.safetensors")
    arm(location.folder, tmp_path / "trace")
    with pytest.raises(ModelError, match=r"no file named model\.safetensors"):
        open_session(location)
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
def test_kernels_from_elsewhere_are_refused(llama: ModelLocation, tmp_path: Path, changes: dict[str, Any]) -> None:
    """A config that names what is to compute its layers is refused with that name: it would be fetched and run."""
    with pytest.raises(ModelError, match=r"_implementation .*(somebody/kernel|flash_attention_2)"):
        open_session(changed(llama, tmp_path / "model", **changes))


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
def test_config_that_does_not_fit_is_refused(
    llama: ModelLocation, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    """Settings that are none, that do not go together, or that the weights do not bear out are refused and named."""
    with pytest.raises(ModelError, match=said) as caught:
        open_session(changed(llama, tmp_path / "model", **changes))
    assert caught.value.hint


def test_weights_left_by_older_files_are_no_reason_to_refuse(llama: ModelLocation, tmp_path: Path) -> None:
    """Frequencies and masks that old files carry are no weights, and do not keep a model from loading."""
    location = changed(llama, tmp_path / "old")
    path = location.folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"][:3].clone()
    tensors["model.layers.0.self_attn.masked_bias"] = tensors["model.norm.weight"][:1].clone()
    save_file(tensors, path, {"format": "pt"})
    assert open_session(location).fingerprints() == open_session(llama).fingerprints()
