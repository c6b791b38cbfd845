"""Laws of what a run is judged by when it goes on: the log that led to its checkpoint, and no other."""

import json
import shutil
from pathlib import Path

import pytest

from finetune.errors import OutputError, RefusedError
from finetune.run.checkpoints import CheckpointStore
from support.workplace import ended, make_data, make_model, resume, run, settings, without_reload_check


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that died behind the same checkpoint; their rows, and so their losses, differ."""
    folder = tmp_path_factory.mktemp("logs")
    make_model(folder / "model")
    for name, step in (("one", 2), ("other", 3)):
        rows = make_data(folder / f"{name}.jsonl", 6, step=step)
        run(settings(folder / "model", rows, training__save_every=1), folder / name, death=14)
    newest = [CheckpointStore(folder / name / "checkpoints").newest() for name in ("one", "other")]
    assert newest[0] == newest[1] is not None
    return folder


@pytest.fixture
def begun(place: Path, tmp_path: Path) -> Path:
    """A copy of the first."""
    return Path(shutil.copytree(place / "one", tmp_path / "run"))


def test_log_of_another_run_is_refused(place: Path, begun: Path) -> None:
    """A log whose every line is whole, and that did not lead to the checkpoint, judges nothing."""
    shutil.copy(place / "other" / "events.jsonl", begun / "events.jsonl")
    with pytest.raises(OutputError, match=r"is not the log that led to the checkpoint of step \d") as caught:
        resume(begun)
    assert caught.value.hint
    assert not (begun / "run.json").exists()


def test_digit_of_what_ties_them_is_refused(begun: Path) -> None:
    """Changed in the checkpoint's own record, it is a damaged checkpoint."""
    newest = CheckpointStore(begun / "checkpoints").newest()
    file = begun / "checkpoints" / f"step-{newest:08d}" / "checkpoint.json"
    told = json.loads(file.read_text())
    assert len(told["log"]) == 16
    file.write_text(json.dumps({**told, "log": told["log"][:-1] + ("0" if told["log"][-1] != "0" else "1")}))
    with pytest.raises(RefusedError, match="is damaged"):
        resume(begun)


def test_log_that_led_to_the_checkpoint_goes_on(begun: Path) -> None:
    """What was logged behind the checkpoint, and is done again, is in nobody's way."""
    with without_reload_check():
        resume(begun)
    assert ended(begun)["status"] == "complete"
