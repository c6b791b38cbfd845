"""Laws of a finished run that is opened again: it is the model that was trained, or it is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.errors import FineTuneError
from finetune.evidence.observe import observe
from finetune.evidence.reopen import reopen
from finetune.evidence.talk import talker
from finetune.records import Conversation, Message
from finetune.train import fine_tune
from support.damages import Damage, changed_bytes, longer
from support.tiny_llamas import open_model
from support.workplace import OWN_TEMPLATE, make_data, make_model, settings, without_reload_check


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a model, its data, a template and a finished run that has changed what the model says."""
    place = tmp_path_factory.mktemp("reopen")
    model, data = make_model(place / "model"), make_data(place / "rows.jsonl", 5)
    template = place / "own.jinja"
    template.write_text(OWN_TEMPLATE)
    changes = {"training__learning_rate": 0.3, "training__epochs": 4.0, "adapter__alpha": 7.0, "adapter__rank": 3}
    with without_reload_check():
        fine_tune(settings(model, data, template__name=str(template), **changes), output=place / "run")
    return place


def test_reopened_run_is_the_run_that_ended(finished: Path) -> None:
    """Losses and answers are those recorded, the logits those of the adapter on a fresh base, not the base's."""
    prepared, session = reopen(finished / "run")
    record = json.loads((finished / "run" / "run.json").read_text())
    found = observe(session, prepared)
    assert found.fixed[0] == pytest.approx(record["losses"]["fixed"][-1]["loss"], rel=1e-5)
    assert found.learning is not None
    assert [answer.given for answer in found.learning.answers] == [
        answer["given"] for answer in record["scores"]["learning"]["tuned"]["answers"]
    ]
    ids = prepared.train.rows[0].ids
    fresh = open_model(finished / "model")
    base = fresh.logits(ids)
    fresh.load_adapter(finished / "run" / "adapter")
    tuned: Any = session.logits(ids)  # type: ignore[attr-defined]
    assert np.array_equal(tuned, fresh.logits(ids))
    assert np.abs(tuned - base).max() > 0.1


def test_talker_says_what_the_tuned_model_says(finished: Path) -> None:
    """What is said in a chat is what the adapter on a fresh base says to the prompt trained on, and not the base."""
    prepared, session = reopen(finished / "run")
    talk = talker(finished / "run", max_new_tokens=6)
    said, base = [], []
    for text in ("rows", "rows word word", "what?", "7"):
        asked = Conversation((Message("user", text),), "question")
        ids, encoder = prepared.encoder.prompt_ids(asked), prepared.encoder
        said.append(talk(asked).text)
        assert said[-1] == encoder.tokenizer.decode(session.generate([ids], 6, encoder.stop_ids)[0]).strip()
        with session.adapter_disabled():
            base.append(encoder.tokenizer.decode(session.generate([ids], 6, encoder.stop_ids)[0]).strip())
    assert said != base


def _other_base(place: Path) -> None:
    shutil.rmtree(place / "model")
    make_model(place / "model", seed=1)


CHANGES: dict[str, Damage] = {
    "other weights of the same shape": _other_base,
    "other data": longer("rows.jsonl", '{"prompt": "more", "completion": "1"}\n'),
    "a byte of the adapter": changed_bytes(
        "run/adapter/adapter_model.safetensors",
        lambda content: content[:-6] + bytes([content[-6] ^ 0x40]) + content[-5:],
    ),
    "where to stop": longer("run/adapter/generation_config.json", " "),
    "the template beside the adapter": longer("run/adapter/chat_template.jinja", " "),
    "no folder of the adapter": lambda place: shutil.rmtree(place / "run" / "adapter"),
    "no adapter": lambda place: (place / "run" / "adapter" / "adapter_model.safetensors").unlink(),
    "no manifest": lambda place: (place / "run" / "run.json").unlink(),
}


OF_THE_TEMPLATE = ("the template beside the adapter", "no folder of the adapter")
"""Where the run's copy of the template is to blame, it is named; the file that it was made from no longer matters."""


@pytest.mark.parametrize("what", CHANGES)
def test_reopened_run_on_something_else_is_refused(what: str, finished: Path) -> None:
    """A run whose base, data, template, adapter or manifest is not what it was is refused, never quietly scored."""
    kept = finished.with_name("kept")
    shutil.copytree(finished, kept)
    try:
        CHANGES[what](finished)
        with pytest.raises(FineTuneError) as caught:
            reopen(finished / "run")
        assert ("adapter/chat_template.jinja" in caught.value.message) == (what in OF_THE_TEMPLATE)
        # To talk to the model needs no data, and takes the template that travels with the adapter.
        if what not in ("other data", "other template"):
            with pytest.raises(FineTuneError):
                talker(finished / "run", max_new_tokens=6)
    finally:
        shutil.rmtree(finished)
        kept.rename(finished)
