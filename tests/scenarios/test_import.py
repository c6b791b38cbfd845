"""A GGUF file becomes a model folder that says the same; what cannot be read is refused, and leaves nothing."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")

from safetensors.numpy import load_file

from finetune.chat.tokenizer import FileTokenizer
from finetune.export.corpus import nasty_texts
from finetune.export.families import FAMILIES
from finetune.export.gguf import plan_whole
from finetune.export.import_gguf import import_gguf
from finetune.export.outtypes import Outtype
from finetune.export.write import write_gguf
from finetune.models.shape import read_shape
from support.gguf_models import CONFIGS, exportable, give_tokenizer, make_model

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
