"""Laws of the model card: what was measured and nothing else, in the hub's form, without a path of this machine."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetune.intervals import wilson_interval
from finetune.report.card import licence_in, model_card
from finetune_strategies.profiles import examples
from support.sample_run import sample_run

pytestmark = pytest.mark.tools
FORMS = st.sampled_from(["adapter", "model", "merged"])


def changed(record: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The record with other values of settings."""
    plan = [{**entry, "value": values.get(entry["key"].replace(".", "_"), entry["value"])} for entry in record["plan"]]
    return {**record, "plan": plan}


def of_card(text: str) -> Any:
    """A card as the hub's own library reads it."""
    from huggingface_hub import ModelCard

    return ModelCard(text).data


@given(
    FORMS, st.sampled_from(["hub", "local", "shipped"]), st.sampled_from(["", "apache-2.0", "other: 'x'"]), st.data()
)
@examples(1 / 2)
def test_card_is_read_by_the_hub_and_holds_what_was_measured(
    form: Any, source: Any, licence: str, data: st.DataObject
) -> None:
    """The hub's library reads base, licence and scores from it, each with its count and its interval."""
    count = data.draw(st.integers(1, 300))
    right = data.draw(st.integers(0, count))
    answers = [{"right": number < right} for number in range(count)]
    scores = {"base": {"answers": [{"right": False}] * count}, "tuned": {"answers": answers}}
    record = sample_run(scores={"learning": scores, "retention": None})
    record["model"] = {**record["model"], "name": "someone/base", "source": source}
    told = model_card(record, licence, form)
    read = of_card(told)
    assert (read.get("base_model"), read.get("license")) == (
        "someone/base" if source == "hub" else None,
        licence or None,
    )
    [found] = [each for each in read.eval_results if each.metric_type == "exact_match"]
    low, high = wilson_interval(right, count)
    assert found.metric_value == pytest.approx(right / count, abs=1e-4)
    assert found.metric_args == {"right": right, "count": count, "interval_95": [round(low, 4), round(high, 4)]}
    assert f"| {right} of {count} | {low:.1%} to {high:.1%} |" in told
    assert read.library_name == ("peft" if form == "adapter" else "transformers")
    assert all(file["sha256"] in told for file in record["model"]["files"])


@pytest.mark.parametrize("form", ["adapter", "model", "merged"])
def test_card_names_no_place_of_this_machine(form: Any) -> None:
    """Bases, data and templates in folders are told by their names alone, and what loads them is Python."""
    home = "/home/somebody/private"
    record = sample_run()
    record["model"] = {**record["model"], "name": f"{home}/my-base/", "source": "local"}
    record["data"] = {**record["data"], "files": [{"path": f"{home}/rows.jsonl", "sha256": "0" * 64, "bytes": 1}]}
    record = changed(record, model_path=f"{home}/my-base", data_train=f"{home}/rows.jsonl")
    record = changed(record, template_name=f"{home}/mine.jinja", data_retention=f"{home}/kept.jsonl")
    told = model_card(record, "", form)
    assert home not in told
    assert "my-base" in told
    assert "`rows.jsonl`" in told
    [code] = re.findall(r"```python\n(.*?)```", told, re.DOTALL)
    compile(code, "card", "exec")
    assert ("PeftModel" in code) == (form == "adapter")


def test_card_does_not_depend_on_how_a_run_is_kept() -> None:
    """What may change when a run goes on (how often it is saved, its trackers, its cache) changes no byte of a card."""
    record = sample_run()
    free = ("training.save_every", "tracking.", "tokens.cache")
    told = [entry for entry in record["plan"] if entry["key"].startswith(free)]
    others = [{**entry, "value": 7} if entry in told else entry for entry in record["plan"]]
    assert "training.save_every" in [entry["key"] for entry in told]
    assert model_card({**record, "plan": others}, "", "adapter") == model_card(record, "", "adapter")


def test_card_of_nothing_measured_has_no_number() -> None:
    """Where no question was asked and no validation loss measured, there is no score, and the reason is told."""
    record = sample_run(scores=None, not_measured={"learning": "no answer is short"})
    record["losses"] = {**record["losses"], "held_out": []}
    told = model_card(record, "", "adapter")
    assert of_card(told).eval_results is None
    assert "| score |" not in told
    assert "- Not measured, learning: no answer is short" in told


def test_licence_of_a_card_is_read_again(tmp_path: Path) -> None:
    """What a card says of the licence is what is read from it."""
    for licence in ("", "apache-2.0"):
        (tmp_path / "README.md").write_text(model_card(sample_run(), licence, "model"), encoding="utf-8")
        assert licence_in(tmp_path) == licence


def test_run_leaves_its_card_beside_what_it_trained(tmp_path: Path) -> None:
    """The adapter's folder of a real run has the card of that very run, and no word of the folder that it lies in."""
    from finetune.config import load_config
    from finetune.train import fine_tune
    from support.workplace import QUICK, make_data, make_model, without_reload_check

    make_model(tmp_path / "my-model")
    make_data(tmp_path / "my-rows.jsonl", 6)
    chosen = {**QUICK, "backend": "reference", "model.path": str(tmp_path / "my-model")}
    chosen |= {"data.train": str(tmp_path / "my-rows.jsonl")}
    with without_reload_check():
        loaded = load_config(None, environ={}, overrides=chosen, profile=None)
        folder, record = fine_tune(loaded, output=tmp_path / "run")
    told = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert told == model_card(record, "", "adapter")
    assert str(tmp_path) not in told
    assert {"my-model", "my-rows.jsonl"} <= set(re.findall(r"[\w.-]+", told))
    assert yaml.safe_load(told.split("---\n")[1])["library_name"] == "peft"
    assert "adapter/README.md" in [file["path"] for file in record["artifacts"]]
