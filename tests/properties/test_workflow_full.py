"""Laws of a run that trains the whole model: what it leaves behind is a model, and nothing is said of an adapter."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.chat.tokenizer import FileTokenizer
from finetune.config import load_plan
from finetune.errors import ConfigError, ModelError
from finetune.evidence.reopen import compare, reopen
from finetune.evidence.talk import talker
from finetune.models.shape import read_shape
from finetune.records import Conversation, Message
from finetune.train import fine_tune
from support.tiny_llamas import open_model
from support.workplace import make_data, make_model, settings, without_charts, without_reload_check

FULL = {"adapter__kind": "full", "adapter__rank": 8, "training__learning_rate": 0.05, "training__save_every": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a model, its data and a finished run; its saved model is loaded in a fresh process."""
    folder = tmp_path_factory.mktemp("full")
    make_model(folder / "model"), make_data(folder / "rows.jsonl", 7)
    with without_charts():
        fine_tune(settings(folder / "model", folder / "rows.jsonl", **FULL), output=folder / "run")
    return folder


def verdicts_of(run: Path) -> dict[str, Any]:
    """The verdicts of a run by their ids."""
    return {verdict["id"]: verdict for verdict in json.loads((run / "run.json").read_text())["verdicts"]}


def test_full_run_leaves_a_whole_model(place: Path) -> None:
    """The run folder holds a model with every weight of the base, each changed, its tokenizer, template and stops."""
    model = place / "run" / "model"
    assert not (place / "run" / "adapter").exists()
    base, tuned = open_model(place / "model"), open_model(model)
    assert base.weights.keys() == tuned.weights.keys()
    assert all((base.weights[name] != tuned.weights[name]).any() for name in base.weights)
    assert read_shape(model).weights == read_shape(place / "model").weights
    assert FileTokenizer(model).identity() == FileTokenizer(place / "model").identity()
    assert "chatml" in (place / "run" / "plan.yaml").read_text()
    assert "<|im_start|>" in (model / "chat_template.jinja").read_text()
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"]
    record = json.loads((place / "run" / "run.json").read_text())
    assert record["model"]["trainable_parameters"] == record["model"]["parameters"] == read_shape(model).parameters


def test_full_run_is_judged_by_what_applies_to_it(place: Path) -> None:
    """What speaks of an adapter does not apply and says why; every tensor changed; a fresh process finds the same."""
    found = verdicts_of(place / "run")
    for name in ("parameter-exactly", "parameter-first-step", "memory-efficiency", "memory-exact", "memory-resident"):
        assert found[name]["outcome"] == "not applicable"
        assert "whole model" in found[name]["reason"] or "no adapter" in found[name]["reason"]
    assert found["parameter-updates"]["outcome"] == "passed"
    assert found["parameter-updates"]["measured"].startswith("100% of 12")
    assert found["artifacts-reload"]["outcome"] == "passed"
    assert "saved model" in found["artifacts-reload"]["title"]


def test_full_run_opened_again_is_the_model_that_was_trained(place: Path) -> None:
    """Losses are those recorded, for the base and for the tuned model; chatting asks the tuned one."""
    prepared, session = reopen(place / "run")
    base, tuned = compare(prepared, session)
    told = [each["loss"] for each in json.loads((place / "run" / "run.json").read_text())["losses"]["fixed"]]
    assert [base.fixed[0], tuned.fixed[0]] == pytest.approx(told, rel=1e-5)
    assert told[1] < 0.95 * told[0]
    asked = Conversation((Message("user", "rows"),), "question")
    ids = prepared.encoder.prompt_ids(asked)
    said = open_model(place / "run" / "model").generate([ids], 6, prepared.encoder.stop_ids)[0]
    answer = talker(place / "run", max_new_tokens=6)(asked).text
    assert answer == prepared.encoder.tokenizer.decode(said).strip()


def test_full_run_whose_model_was_changed_is_refused(place: Path, tmp_path: Path) -> None:
    """A saved model with a changed byte is not the one that was trained: it is refused, never quietly scored."""
    path = place / "run" / "model" / "model.safetensors"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-6] + bytes([content[-6] ^ 0x40]) + content[-5:])
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            reopen(place / "run")
    finally:
        path.write_bytes(content)


def test_setting_of_an_adapter_where_there_is_none_is_refused(place: Path, tmp_path: Path) -> None:
    """With adapter.kind full each setting of an adapter is refused by name, all at once; a profile's are no wish."""
    said = {"adapter__rank": 3, "adapter__target_modules": ["q_proj"], "training__loraplus_lr_ratio": 2.0}
    with pytest.raises(ConfigError) as caught:
        fine_tune(settings(place / "model", place / "rows.jsonl", **{**FULL, **said}), output=tmp_path / "run")
    places = [problem.where.partition(" ")[0] for problem in caught.value.problems]
    assert places == ["adapter.rank", "adapter.target_modules", "training.loraplus_lr_ratio"]
    assert not (tmp_path / "run").exists()


def test_order_of_patterns_survives_the_plan(place: Path, tmp_path: Path) -> None:
    """The first pattern that fits counts, so a plan keeps their order: resumed, each layer has the rank it had."""
    patterns = {"v_proj": 2, "q_proj|k_proj": 1, "k_proj|o_proj": 3}
    changes = {"adapter__rank_pattern": patterns, "adapter__alpha_pattern": {"o_proj": 3.0, ".*_proj": 5.0}}
    loaded = settings(place / "model", place / "rows.jsonl", **changes)
    with without_reload_check():
        fine_tune(loaded, output=tmp_path / "run")
    plan = load_plan(tmp_path / "run" / "plan.yaml").config
    assert list(plan.adapter.rank_pattern or {}) == list(patterns)
    assert list(plan.adapter.alpha_pattern or {}) == ["o_proj", ".*_proj"]
    prepared, session = reopen(tmp_path / "run")
    assert prepared.target is not None
    assert [prepared.target.rank_of(f"a.{name}") for name in ("k_proj", "o_proj", "v_proj", "up_proj")] == [1, 3, 2, 2]
    assert np.isfinite(compare(prepared, session)[1].fixed[0])
