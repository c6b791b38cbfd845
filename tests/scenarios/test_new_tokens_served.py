"""A run with new tokens is served, and goes on when the model that was made for it is gone from the cache."""

import json
import shutil
from pathlib import Path

import pytest

from finetune.chat.tokenizer import FileTokenizer
from finetune.cli.app import run as ft
from finetune.errors import ModelError
from finetune.export.new_tokens import add_tokens, with_new_tokens
from finetune.files import describe_files
from finetune.models.locate import locate_model
from finetune.serve.deploy import Deployed, deploy_llama_cpp
from finetune.serve.llama_server import LlamaServer
from finetune.train import fine_tune
from support.served_models import shipped_gguf
from support.sessions import need
from support.workplace import make_data, make_model, settings, without_reload_check

pytestmark = pytest.mark.tier2
NEW = {"tokens__add_special_tokens": ["<|think|>"], "tokens__add_tokens": ["<tool>", "</tool>"]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models are made in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "finetune"


SHIPPED_AND_LEARNED = {
    "backend": "torch",
    "template__name": "auto",
    "adapter__rank": 8,
    "training__epochs": 100.0,
    "training__batch_size": 4,
    "evaluation__questions": 4,
    "evaluation__max_new_tokens": 12,
}


@pytest.mark.parametrize("special", ["<|think|>", "<|call|>"])
def test_what_was_learned_with_new_tokens_is_served(special: str, tmp_path: Path) -> None:
    """llama.cpp's server says the run's own answers, of which it shows the tokens that are not special.

    One at which llama.cpp ends answers, for its name, is told before training, and an answer that goes on after it is
    refused before a server starts.
    """
    need("torch")
    for library in ("gguf", "xllamacpp"):
        pytest.importorskip(library, reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")
    rows = [{"prompt": f"What is {n} plus {n}?", "completion": f"<tool>{2 * n}</tool>"} for n in range(1, 5)]
    rows[0]["completion"] = f"{special}<tool>2</tool>"
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    new = {"tokens__add_special_tokens": [special], "tokens__add_tokens": ["<tool>", "</tool>"]}
    told: list[str] = []
    loaded = settings(Path("reference-llama"), data, **SHIPPED_AND_LEARNED, **new)
    loaded = with_new_tokens(loaded, tell=told.append)
    with without_reload_check():
        run, record = fine_tune(loaded, output=tmp_path / "run")
    answers = record["scores"]["learning"]["tuned"]["answers"]
    assert [each["given"] for each in answers] == [row["completion"] for row in rows]
    assert any("ends an answer at <|call|>" in each for each in told) == (special == "<|call|>")
    if special == "<|call|>":
        with pytest.raises(ModelError, match=r"goes on after '<\|call\|>'.*ends an answer there"):
            deploy_llama_cpp(run, outtype="f32")
        assert not (run / "deploy").exists()
        return
    shown: list[str] = []

    def ask(_: Deployed, server: LlamaServer) -> None:
        shown.extend(server.chat([{"role": "user", "content": row["prompt"]}], most=12).text for row in rows)

    checks = {check.stage: check for check in deploy_llama_cpp(run, outtype="f32", serve=ask).checks}
    assert checks["answers"].measured == "4 of 4 are the run's own; 4 right, 4 in the run"
    assert checks["stop"].measured == "4 of 4 right answers end by themselves"
    assert shown == [f"<tool>{2 * n}</tool>" for n in range(1, 5)]


TURNS = ("[gMASK]", "<|user|>", "<|assistant|>", "<|observation|>")
NO_ENDS = (
    "[gMASK]{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_answers_that_end_with_the_next_turns_token_are_served(tmp_path: Path) -> None:
    """A model of GLM-4's kind learns to say `<|user|>` after an answer, and llama.cpp's server stops there."""
    need("torch")
    for library in ("gguf", "xllamacpp"):
        pytest.importorskip(library, reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")
    shipped = locate_model("reference-llama")
    tokenizer = FileTokenizer(shipped.folder)
    add_tokens(shipped, tokenizer, dict.fromkeys(TURNS, True), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(NO_ENDS, encoding="utf-8")
    grown = FileTokenizer(tmp_path / "model")
    ends = [tokenizer.eos_id, *(grown.control_id(token) for token in ("<|user|>", "<|observation|>"))]
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    rows = [{"prompt": f"What is {n} plus {n}?", "completion": f"{2 * n}"} for n in range(1, 5)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    chosen = {**SHIPPED_AND_LEARNED, "template__name": "tokenizer", "tokens__add_special_tokens": list(TURNS)}
    with without_reload_check():
        run, _ = fine_tune(settings(tmp_path / "model", data, **chosen), output=tmp_path / "run")
    deployed = deploy_llama_cpp(run, outtype="f32")
    checks = {check.stage: check.measured for check in deployed.checks}
    assert {"<|user|>", "<|observation|>"} <= {*deployed.stops}
    assert checks["answers"] == "4 of 4 are the run's own; 4 right, 4 in the run"
    assert checks["stop"] == "4 of 4 right answers end by themselves"
    told = json.loads((run / "adapter" / "generation_config.json").read_text(encoding="utf-8"))
    assert told["eos_token_id"][0] == grown.control_id("<|user|>")


def finished_run(place: Path) -> Path:
    """A finished run with new tokens on a tiny model, by the reference."""
    base = make_model(place / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "hidden_act": "silu"}), encoding="utf-8")
    loaded = settings(base, make_data(place / "rows.jsonl", 9), **NEW)
    with without_reload_check():
        run, _ = fine_tune(loaded, output=place / "run")
    return run


VERBS = {
    "evaluate": ["evaluate", "RUN"],
    "chat": ["chat", "RUN", "--prompt", "hi", "--max-new-tokens", "2"],
    "merge": ["merge", "RUN"],
    "export": ["export", "RUN", "--outtype", "f32"],
    "resume": ["train", "--resume", "--output", "RUN"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_base_that_is_gone_from_the_cache_is_made_again(
    verb: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte what it was, at the place where it was, before the command does anything else."""
    if verb in ("merge", "export"):
        need("torch")
    if verb == "export":
        pytest.importorskip("xllamacpp", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")
    run = finished_run(tmp_path)
    before = describe_files(cache)
    assert any(file["path"].endswith("model.safetensors") for file in before)
    shutil.rmtree(cache)
    if verb == "resume":  # killed just before its manifest
        (run / "run.json").unlink()
    with without_reload_check():
        assert ft([str(run) if word == "RUN" else word for word in VERBS[verb]]) in (0, 1, 4), capsys.readouterr()
    assert "gone from the cache: making" in capsys.readouterr().err
    assert describe_files(cache) == before


def test_a_base_that_cannot_be_made_again_is_told(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the model that it was made from has changed, or is gone, nothing is written, and the remedy works."""
    run = finished_run(tmp_path)
    shutil.rmtree(cache)
    config = tmp_path / "base" / "tokenizer_config.json"
    own = config.read_bytes()
    config.write_bytes(own.replace(b"{", b'{"odd": 1,', 1))
    assert ft(["evaluate", str(run)]) == 3
    said = capsys.readouterr().err
    assert "has changed since" in said
    assert "restore the files of that model" in said
    assert not cache.exists()
    config.write_bytes(own)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    assert ft(["evaluate", str(run)]) == 3
    assert str(tmp_path / "base") in capsys.readouterr().err
    assert not cache.exists()
    (tmp_path / "elsewhere").rename(tmp_path / "base")
    assert ft(["evaluate", str(run)]) == 0


@pytest.mark.parametrize("tokens", [NEW, {}], ids=["with new tokens", "as it is"])
def test_a_base_made_of_a_gguf_file_is_made_again(
    tokens: dict[str, object], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The import, and the model with new tokens that was made of it."""
    source = tmp_path / "small.gguf"
    shutil.copy(shipped_gguf(), source)
    loaded = settings(source, make_data(tmp_path / "rows.jsonl", 4), **tokens, training__max_steps=1)
    with without_reload_check():
        run, _ = fine_tune(loaded, output=tmp_path / "run")
    before = describe_files(cache)
    shutil.rmtree(cache)
    assert ft(["chat", str(run), "--prompt", "hi", "--max-new-tokens", "2"]) == 0, capsys.readouterr()
    assert describe_files(cache) == before
    shutil.rmtree(cache)
    source.unlink()
    assert ft(["chat", str(run), "--prompt", "hi"]) == 3
    assert "restore the GGUF file" in capsys.readouterr().err
