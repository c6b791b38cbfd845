"""With each real tokenizer a small model is checked, trained, exported and served, and all ids are those trained on."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")
pytest.importorskip("xllamacpp", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")

from finetune.cli.app import run as ft
from support.real_chats import small_llama
from support.real_templates import FOLDER
from support.real_tokenizers import HOME, REMEDY, TOKENIZERS, tokenizer_folder
from support.workplace import without_reload_check

pytestmark = pytest.mark.tier2
TEMPLATES = {
    "llama2": FOLDER / "llama-2.jinja",
    "llama3_1": FOLDER / "llama-3.1.jinja",
    "phi3": FOLDER / "phi-3.jinja",
    "gptoss": HOME / "templates" / "llama.cpp" / "openai-gpt-oss-120b.jinja",
}
"""The model's own template, where the tokenizer's package brings none or another."""
LARGE = ("qwen3", "gemma3", "deepseek_v3", "gptoss")
"""Tokenizers of 129,000 to 262,000 tokens: each keeps a processor busy for 40 to 90 seconds."""
DATED = ("llama3_1", "gptoss")
"""Templates that print the day."""
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 160,
}
CONFIG: dict[str, dict[str, Any]] = {
    "template": {"name": "tokenizer"},
    "tokens": {"max_length": 160},
    "adapter": {"rank": 2},
    "training": {"max_steps": 2, "batch_size": 2, "learning_rate": 0.02},
    "evaluation": {"questions": 4, "max_new_tokens": 16},
    "judge": {"control": "never", "memory": "never"},
}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The clock may be set to another day, for us and for every program that we start."""
    yield monkeypatch
    monkeypatch.undo()
    time.tzset()


def talk(number: int) -> list[dict[str, str]]:
    """A conversation of one of three kinds."""
    said = ["What is", f"{number} + {number}?", f"It is {2 * number}."]
    roles = [["user", "assistant"], ["system", "user", "assistant"], ["user", "assistant", "user", "assistant"]]
    chosen = roles[number % 3]
    texts = (
        [" ".join(said[:2]), said[2]] if len(chosen) < 3 else ["Be brief.", "Hi", "Hello!", *said[1:]][-len(chosen) :]
    )
    return [{"role": role, "content": text} for role, text in zip(chosen, texts, strict=True)]


def place_of(tokenizer: str, folder: Path) -> Path:
    """A model, data, and a configuration, which is returned."""
    if tokenizer in LARGE and os.environ.get("FT_REAL_MODEL_ENABLE") != "1":
        pytest.skip("takes up to 90 s of a processor: enable with FT_REAL_MODEL_ENABLE=1")
    if not tokenizer_folder(tokenizer).exists():
        pytest.skip(f"{tokenizer} is not here: {REMEDY}")
    model = small_llama(tokenizer, folder / "model", **SMALL)
    if template := TEMPLATES.get(tokenizer):
        if not template.exists():
            pytest.skip(f"{template.name} is not here: {REMEDY}")
        shutil.copy(template, model / "chat_template.jinja")
    data, config = folder / "rows.jsonl", folder / "config.json"
    data.write_text("".join(json.dumps({"messages": talk(number)}) + "\n" for number in range(9)), encoding="utf-8")
    whole = CONFIG | {"model": {"path": str(model)}, "data": {"train": str(data)}}
    config.write_text(json.dumps(whole), encoding="utf-8")
    return config


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_real_tokenizer_is_trained_exported_and_served(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], elsewhere: pytest.MonkeyPatch
) -> None:
    """Every prompt that llama.cpp's server makes has the ids of training, on this day and on another."""
    config, run = place_of(tokenizer, tmp_path), tmp_path / "run"
    assert ft(["check", str(config)]) == 0, capsys.readouterr()
    with without_reload_check():
        assert ft(["train", str(config), "--output", str(run)]) in (0, 1, 4), capsys.readouterr()
    for another_day in (False, True)[: 1 + (tokenizer in DATED)]:
        if another_day:
            elsewhere.setenv("TZ", "AHEAD-14" if time.gmtime().tm_hour >= 10 else "BEHIND+12")
            time.tzset()
            assert date.today() != datetime.now(UTC).date()
        capsys.readouterr()
        code = ft(["deploy", str(run), "--to", "llama.cpp", "--outtype", "f32", "--check-only", "--json"])
        told = capsys.readouterr()
        assert code == 0, told.err
        checks = {check["stage"]: check for check in json.loads(told.out)["checks"]}
        total, equal = (int(word) for word in checks["template"]["measured"].split()[:3:2])
        assert total == equal > 30
        assert " of 4 are the run's own" in checks["answers"]["measured"]
