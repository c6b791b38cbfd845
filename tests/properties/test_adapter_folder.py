"""Laws of the folder a run leaves behind to be used: tokenizer, template and stops are those trained with."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.chat.catalog import CATALOG
from finetune.chat.tokenizer import FileTokenizer
from finetune.train import fine_tune
from finetune_strategies.tokenizers import EOS, KINDS
from support.encoders import TERMINATOR
from support.workplace import make_data, make_model, settings, without_reload_check

OWN = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + '\\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def adapter_of(tmp_path: Path, kind: Any, template: str) -> tuple[Path, Path]:
    """The model and the adapter of a run with this template; the model ships one of its own."""
    model = make_model(tmp_path / "model", kind=kind)
    (model / "chat_template.jinja").write_text(OWN)
    data = make_data(tmp_path / "rows.jsonl", 4)
    with without_reload_check():
        briefly = {"training__max_steps": 1, "evaluation__questions": 0}
        run, _ = fine_tune(settings(model, data, template__name=template, **briefly), output=tmp_path / "run")
    return model, run / "adapter"


@pytest.mark.parametrize("template", [*CATALOG, "tokenizer"])
def test_adapter_folder_has_the_template_that_was_trained_with(template: str, tmp_path: Path) -> None:
    """P-TMPL: the template beside the adapter is the one trained with, whichever the model ships."""
    _, adapter = adapter_of(tmp_path, KINDS[0], template)
    expected = OWN if template == "tokenizer" else CATALOG[template].jinja
    assert (adapter / "chat_template.jinja").read_text() == expected
    assert FileTokenizer(adapter).chat_template == expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.chatml and kind.llama3], ids=str)
@pytest.mark.parametrize("template", ["alpaca", "llama3"])
def test_adapter_folder_has_the_tokenizer_and_the_stops(template: str, kind: Any, tmp_path: Path) -> None:
    """P-STOP: the tokenizer beside the adapter is the base's, and where to stop holds the token that ends an answer."""
    model, adapter = adapter_of(tmp_path, kind, template)
    before, after = FileTokenizer(model), FileTokenizer(adapter)
    assert after.identity() == before.identity()
    assert (after.bos, after.eos) == (before.bos, before.eos)
    said = json.loads((adapter / "generation_config.json").read_text())
    names = [kind.control_tokens[token] for token in said["eos_token_id"]]
    assert names[0] == TERMINATOR[template]
    assert EOS in names
    assert said["pad_token_id"] == before.pad_id
    assert said.get("bos_token_id") == before.bos_id
