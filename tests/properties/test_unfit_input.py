"""Laws of rows and models that do not fit: one clear error, or an honest `inconclusive`, and never a pass."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.config import LoadedConfig
from finetune.errors import FineTuneError, ModelError, NonFiniteError
from finetune.evidence.open_answers import open_questions
from finetune.judge import judge_tuned
from finetune.train import fine_tune
from finetune.training.prepare import prepare
from support.workplace import ADAPTER, make_data, make_model, settings, without_reload_check


def long_answer(number: int) -> str:
    """Nine words of its own."""
    return " ".join(f"a{number}{place}" for place in range(9))


EXACT = [{"prompt": f"q{n}", "completion": f"{n}"} for n in range(12)]
OPEN = [{"prompt": f"of {n}", "completion": long_answer(n)} for n in range(12)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    folder = tmp_path_factory.mktemp("unfit")
    make_model(folder / "model")
    return folder


def rows_in(path: Path, rows: list[dict[str, str]]) -> Path:
    """The rows as a file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def loaded(place: Path, rows: list[dict[str, str]], **changes: Any) -> LoadedConfig:
    """A quick run on these rows."""
    model = changes.pop("model", place / "model")
    return settings(model, rows_in(place / "rows.jsonl", rows), tokens__max_length=200, **changes)


def outcomes_of(loaded_: LoadedConfig, output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run records, and its verdicts by id."""
    with without_reload_check():
        _, record = fine_tune(loaded_, output=output)
    return record, {each["id"]: each for each in record["verdicts"]}


def test_exact_and_open_rows_together_and_two_held_out_are_judged_as_open(place: Path, tmp_path: Path) -> None:
    """A mixture is judged by claims; two unseen rows carry none of them, and it is said how many would."""
    held = rows_in(tmp_path / "held.jsonl", [{"prompt": f"v{n}", "completion": long_answer(50 + n)} for n in range(2)])
    mixed = loaded(place, [row for pair in zip(EXACT, OPEN, strict=True) for row in pair], data__valid=str(held))
    prepared = prepare(mixed)
    assert (prepared.answers, prepared.goal, len(prepared.unseen)) == ("open", "rows", 2)
    record, verdicts = outcomes_of(loaded(place, OPEN, data__valid=str(held), judge__goal="generalise"), tmp_path / "r")
    assert record["outcome"] != "passed"
    assert verdicts["claim-unseen"]["outcome"] == verdicts["claim-association"]["outcome"] == "inconclusive"
    assert "2 rows are too few to tell; about" in verdicts["claim-unseen"]["reason"]
    assert any("2 unseen rows were held out" in each for each in record["advice"])


def test_answers_that_are_all_equal_are_never_called_learned(place: Path, tmp_path: Path) -> None:
    """Short ones end inconclusive, for no control can be made; long ones are open, and no row can be told by them."""
    same = [{"prompt": f"of {n}", "completion": "yes"} for n in range(12)]
    record, verdicts = outcomes_of(loaded(place, same, judge__control="always"), tmp_path / "run")
    assert record["outcome"] != "passed"
    assert verdicts["learning-control"]["outcome"] == "inconclusive"
    assert "one answer fills half of the rows" in verdicts["learning-control"]["reason"]
    prepared = prepare(loaded(place, [{**row, "completion": long_answer(0)} for row in same]))
    assert prepared.answers == "open"
    assert open_questions(prepared).rows is None


def test_base_of_which_a_weight_is_nan_is_refused(place: Path, tmp_path: Path) -> None:
    """No number comes of a model that computes NaN: one error names it, and no run folder is left."""
    broken = tmp_path / "broken"
    shutil.copytree(place / "model", broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(each for each in tensors if "down_proj" in each)
    tensors[name][0, 0] = np.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"without training, is nan .*rows\.jsonl:1") as caught:
        fine_tune(loaded(place, EXACT, model=broken), output=tmp_path / "run")
    assert "broken weights" in str(caught.value.hint)
    assert not (tmp_path / "run").exists()


def test_base_that_knows_everything_is_not_said_to_have_learned(place: Path, tmp_path: Path) -> None:
    """Trained again on rows that it answers already, a model cannot improve: never a pass, and the reason is told."""
    data = make_data(tmp_path / "exact.jsonl", 6)
    taught: dict[str, Any] = {"adapter__kind": "full", "adapter__rank": 8, "training__learning_rate": 0.03}
    with without_reload_check():
        fine_tune(settings(place / "model", data, **taught, training__epochs=70.0), output=tmp_path / "taught")
    again = settings(tmp_path / "taught/model", data, judge__control="always", evaluation__questions=6)
    record, verdicts = outcomes_of(again, tmp_path / "run")
    assert record["scores"]["learning"]["base"]["right"] == 6
    assert record["outcome"] != "passed"
    assert verdicts["learning-signed"]["outcome"] != "passed"
    assert any("the base gets 100% of these rows right already" in each for each in record["advice"])


def cut_table(folder: Path) -> None:
    """A table of 40 rows, of a tokenizer that gives out more ids."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    words = config["vocab_size"]
    cut = {name: each[:40].copy() if each.shape[0] == words else each for name, each in tensors.items()}
    save_file(cut, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 40}))


def added_pad(folder: Path) -> None:
    """A padding token that was added to the tokenizer and not to the model."""
    words = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = {"id": words, "content": "<added>", "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"].append({**added, "normalized": False, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**told, "pad_token": "<added>"}))


@pytest.mark.parametrize(
    ("change", "says"),
    [(cut_table, r"gives '.*' the id \d+ \(.*rows\.jsonl:1\), and .* has 40 rows"), (added_pad, "'<added>' the id")],
)
def test_ids_beyond_the_embedding_table_are_refused(
    place: Path, tmp_path: Path, change: Callable[[Path], None], says: str
) -> None:
    """A tokenizer with more ids than the model has rows is refused before a weight is loaded, with token and row."""
    model = tmp_path / "model"
    shutil.copytree(place / "model", model)
    change(model)
    with pytest.raises(ModelError, match=says) as caught:
        prepare(loaded(place, EXACT, model=model))
    assert "resize the model's embeddings" in str(caught.value.hint)


def test_foreign_adapter_of_a_relative_is_told_and_one_of_nan_is_refused(place: Path, tmp_path: Path) -> None:
    """One of another base's shape or of NaN is refused, one that names another base is noted."""
    with without_reload_check():
        fine_tune(loaded(place, EXACT), output=tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    shutil.copytree(place / "model", tmp_path / "relative")
    notes = judge_tuned(loaded(place, EXACT), adapter)["notes"]
    told = judge_tuned(loaded(place, EXACT, model=tmp_path / "relative"), adapter)["notes"]
    assert len(told) == len(notes) + 1
    base = re.search(r"trained on 'model \(sha256 [0-9a-f]{16}\)', and it was judged on '(.*)'", told[-1])
    assert base is not None
    assert base[1] == str(tmp_path / "relative")
    tensors = load_file(tmp_path / "run" / ADAPTER)
    wider = {name: np.pad(each, ((0, 0), (0, 4))) if "lora_A" in name else each for name, each in tensors.items()}
    shutil.copytree(adapter, tmp_path / "wider")
    save_file(wider, tmp_path / "wider" / "adapter_model.safetensors")
    with (
        patch("finetune.judge.observe", side_effect=AssertionError("looked at before it was refused")),
        pytest.raises(ModelError, match=r"is not one of .*lora_A.*, and here it would be"),
    ):
        judge_tuned(loaded(place, EXACT), tmp_path / "wider")
    next(each for name, each in tensors.items() if "lora_B" in name)[0, 0] = np.nan
    save_file(tensors, tmp_path / "run" / ADAPTER)
    with pytest.raises(FineTuneError, match=r"is nan|NaN|cannot be loaded"):
        judge_tuned(loaded(place, EXACT), adapter)
