"""Laws of a killed run: wherever it died, going on ends in the run that was never killed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("torch", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")

from finetune import train as pipeline
from finetune.config import LoadedConfig, load_config, load_plan
from finetune.events import CheckpointSaved, Event, StepDone
from finetune.records import Reload
from finetune.run.folder import RunFolder

pytestmark = pytest.mark.tier2
STEPS = 5
QUICK = {
    "training.max_steps": STEPS,
    "training.batch_size": 5,
    "training.save_every": 2,
    "training.evaluate_every": 2,
    "adapter.dropout": 0.2,
    "data.valid_fraction": 0.2,
    "evaluation.questions": 2,
    "evaluation.retention_questions": 2,
    "evaluation.max_new_tokens": 4,
    "judge.control": "never",
    "judge.memory": "never",
}


@pytest.fixture(autouse=True, scope="module")
def _no_fresh_process() -> Iterator[None]:
    """The check in a fresh process has laws of its own, and takes seconds each time."""
    with patch("finetune.evidence.observe.check_reload", lambda *given, **named: Reload(8, 10.0, 0.0, 1.0)):
        yield


class Killed(BaseException):
    """Stands for the death of the process: nothing of ours catches it."""


def start(folder: Path, **how: Any) -> dict[str, Any]:
    """A new short run on the shipped model and data."""
    loaded = load_config(None, environ={}, overrides=dict(QUICK), profile=None)
    return pipeline.fine_tune(loaded, output=folder, **how)[1]


def resume(folder: Path) -> dict[str, Any]:
    """Continue it, as `ft train --resume` does."""
    plan = load_plan(RunFolder.unfinished(folder).plan)
    return pipeline.fine_tune(LoadedConfig(plan.config, plan.origins), output=folder, resume=True)[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that nobody killed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, start(folder)


def _dies_at(kind: type[Event], step: int) -> Any:  # type: ignore[valid-type]
    def listen(event: Event) -> None:
        if isinstance(event, kind) and getattr(event, "step", 0) == step:
            raise Killed

    return listen


@pytest.mark.parametrize(
    "death", ["after step 1", "after step 3", "at checkpoint 2", "judging", "reporting", "manifest"]
)
def test_resume_ends_in_the_run_that_was_never_killed(
    death: str, whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before, between or at checkpoints, while judging or writing: the end has the same adapter and losses."""
    folder = tmp_path / "run"

    def die(*arguments: Any, **named: Any) -> Any:
        raise Killed

    listeners = {
        "after step 1": _dies_at(StepDone, 1),
        "after step 3": _dies_at(StepDone, 3),
        "at checkpoint 2": _dies_at(CheckpointSaved, 2),
    }
    with monkeypatch.context() as planted:
        if death == "judging":
            planted.setattr(pipeline, "judge", die)
        elif death == "reporting":
            planted.setattr(pipeline, "render_html", die)
        elif death == "manifest":
            planted.setattr(RunFolder, "write_manifest", die)
        with pytest.raises(Killed):
            start(folder, **({"listener": listeners[death]} if death in listeners else {}))
    # What a kill in the middle of a write leaves behind.
    (folder / ".run.json.77.part").write_text("{")
    with (folder / "events.jsonl").open("a") as events:
        events.write('{"event": "StepDo')
    found = resume(folder)
    expected_folder, expected = whole
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (expected_folder / name).read_bytes()
    assert found["losses"] == expected["losses"]
    assert len(found["losses"]["train"]) == STEPS
    assert [loss["step"] for loss in found["losses"]["fixed"]] == [0, STEPS]
    assert found["scores"] == expected["scores"]
    assert found["verdicts"] == expected["verdicts"]
    assert "passed" in [verdict["outcome"] for verdict in found["verdicts"] if verdict["id"] == "artifacts-no-strays"]
    lines = (folder / "events.jsonl").read_text().splitlines()
    assert all(json.loads(line) for line in lines)
