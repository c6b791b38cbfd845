"""A GGUF file becomes a model folder that says the same; what cannot be read is refused, and leaves nothing."""

import ctypes
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")

import gguf
from safetensors.numpy import load_file

from finetune.chat.tokenizer import FileTokenizer
from finetune.export.corpus import nasty_texts
from finetune.export.families import FAMILIES
from finetune.export.gguf import plan_whole
from finetune.export.import_gguf import import_gguf
from finetune.export.outtypes import Outtype
from finetune.export.quantise import quantise
from finetune.export.write import write_gguf
from finetune.models.shape import read_shape
from support.gguf_bytes import RawGguf, finite_blocks
from support.gguf_models import CONFIGS, exportable, give_tokenizer, gpt2_like, make_model

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
