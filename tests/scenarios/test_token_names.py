"""Tokens that llama.cpp takes for control tokens by their names alone: what is exported and imported knows them."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")
pytest.importorskip("xllamacpp", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")

from finetune.chat.tokenizer import FileTokenizer
from finetune.errors import ExportError
from finetune.export import vocabulary
from finetune.export.gguf import plan_whole, write_exportable
from finetune.export.import_gguf import import_gguf
from finetune.export.write import write_gguf
from support.gguf_models import exportable, gpt2_like, make_model

FLAGS = {"<|fim_prefix|>": False, "<|fim_pad|>": False, "<think>": False, "<|channel|>": True, "<|call|>": True}
FLAGS |= {"<|return|>": True, "<|end|>": True, "<｜User｜>": False}
"""Tokens that are added, and whether each is flagged as a control token."""
WORD = "<EOT>"
"""A word that no merge makes, as "</s>" is in Qwen's vocabulary."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model whose tokenizer has all of them."""
    folder = make_model("llama", tmp_path / "model")
    gpt2_like(folder)
    path = folder / "tokenizer.json"
    said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rules, vocab = said["added_tokens"][0], said["model"]["vocab"]
    vocab[WORD] = len(vocab)
    for place, (text, flag) in enumerate(FLAGS.items(), start=len(vocab)):
        said["added_tokens"].append({**rules, "id": place, "content": text, "special": flag})
    path.write_text(json.dumps(said), encoding="utf-8")
    return folder


def test_export_passes_with_tokens_that_llama_cpp_knows_by_name(model: Path, tmp_path: Path) -> None:
    """Each text that names one is cut alike, as plain text and as markup; and so it is when the file is imported."""
    done = write_exportable(exportable(model), tmp_path / "model.gguf", "f32")
    assert len([note for note in done.notes if "their names" in note or "another name" in note]) == 3
    again = import_gguf(done.path, output=tmp_path / "again")
    assert all(check.passed for check in again.checks)
    own, back = FileTokenizer(model), FileTokenizer(again.path)
    for text in [*FLAGS, WORD, f"a {WORD} b"]:
        assert back.encode_markup(text) == own.encode_markup(text)


def test_export_under_their_own_names_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof of a file tells the word that llama.cpp reads as a control token; an import of it is told so, too."""
    monkeypatch.setattr(vocabulary, "find_misread", lambda *given: {})
    with pytest.raises(ExportError, match=r"at the stage 'token ids'.*markup '<EOT>'"):
        write_exportable(exportable(model), tmp_path / "model.gguf", "f32")
    write_gguf(plan_whole(exportable(model), "f32"), tmp_path / "theirs.gguf")
    again = import_gguf(tmp_path / "theirs.gguf", output=tmp_path / "again")
    assert [note for note in again.notes if WORD in note]
    assert FileTokenizer(again.path).encode_markup(WORD) == FileTokenizer(model).encode_markup(WORD)
