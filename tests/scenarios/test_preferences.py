"""Laws of whole runs on pairs: they begin at ln 2, learn, survive being killed, and go on from an adapter."""

import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from finetune.chat.encoder import sides_of
from finetune.evidence.evaluate import evaluate
from finetune.train import fine_tune
from support.workplace import ADAPTER, make_model, settings, without_reload_check

pytestmark = pytest.mark.tier2
NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hal", "Ida", "Jon")
THINGS = ("a lamp", "the red door", "two keys", "an old map", "her coat", "some tea", "the last bus", "a green hat")


def make_pairs(path: Path, first: int, count: int) -> Path:
    """Pairs that agree in all but their last words: a kind answer is preferred to a rude one."""
    rows = []
    for at in range(first, first + count):
        asked = f"{NAMES[at % 10]} asks {at} for {THINGS[at // 10 % 8]}"
        rows.append({"prompt": asked, "chosen": f"{at} gladly, thank you", "rejected": f"{at} no, go away now"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, pairs to learn, and pairs that it never sees."""
    place = tmp_path_factory.mktemp("pairs")
    make_model(place / "model")
    make_pairs(place / "rows.jsonl", 0, 24)
    make_pairs(place / "valid.jsonl", 100, 20)
    make_pairs(place / "more.jsonl", 200, 20)
    return place


def train(place: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A run on the pairs; what run.json then holds."""
    chosen = {"training__objective": "dpo", "data__valid": str(place / "valid.jsonl"), "training__epochs": 4, **changes}
    model = chosen.pop("model", place / "model")
    with without_reload_check():
        return fine_tune(settings(model, place / "rows.jsonl", **chosen), output=output)[1]


@pytest.fixture(scope="module", params=["reference", "torch"])
def run(request: pytest.FixtureRequest, place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run with each of two backends."""
    if request.param == "torch":
        pytest.importorskip("torch")
    output = tmp_path_factory.mktemp(request.param) / "run"
    return {"folder": output, **train(place, output, backend=request.param, judge__control="always")}


def verdict(run: dict[str, Any], key: str) -> dict[str, Any]:
    """One verdict of a run."""
    return next(each for each in run["verdicts"] if each["id"] == key)


def test_run_on_pairs_begins_at_ln_2_and_tells_them_apart(run: dict[str, Any], place: Path) -> None:
    """Before the first step no pair is preferred; afterwards nearly all are, the unseen ones and a later file too."""
    first = run["losses"]["train"][0]["loss"]
    assert first == pytest.approx(math.log(2), abs=1e-5)
    for kind in ("fixed", "held_out"):
        assert run["losses"][kind][0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert run["losses"][kind][-1]["loss"] < 0.5
    assert run["goal"] == "preference"
    for key in ("preference-rows", "preference-unseen"):
        assert verdict(run, key)["outcome"] == "passed", verdict(run, key)
    control = verdict(run, "preference-control")
    assert control["outcome"] == "passed", control
    flipped = run["preference"]["control"]
    assert sum(flipped["found"]) < 0 < sum(flipped["tuned"] or run["preference"]["unseen"])
    for key in ("loss-start", "model-learning", "learning-control", "claim-rows", "claim-unseen"):
        assert verdict(run, key)["outcome"] == "not applicable"
        assert verdict(run, key)["reason"]
    found = evaluate(run["folder"], place / "more.jsonl")
    [preferred] = [each for each in found["measures"] if each["id"] == "preferred"]
    assert preferred["outcome"] == "passed"
    assert preferred["gained"] > 0.9


def test_control_of_flipped_pairs_sees_labels_that_are_not_read(place: Path, tmp_path: Path) -> None:
    """Where the answer that sorts first is always the chosen one, all gains look right, and the control gains alike."""

    def by_its_words(example: Any) -> Any:
        return tuple(sorted(sides_of(example), key=lambda side: [message.content for message in side.messages]))

    with patch("finetune.chat.encoder.sides_of", by_its_words):
        found = train(place, tmp_path / "run", judge__control="always")
    assert verdict(found, "preference-unseen")["outcome"] == "passed"
    assert verdict(found, "preference-control")["outcome"] == "failed"
    assert found["outcome"] == "failed"


def test_killed_run_on_pairs_ends_with_the_same_bytes(place: Path, tmp_path: Path) -> None:
    """The reference is of step 0, wherever a run was killed: resumed, it ends with the bytes of one that never was."""
    how = {"training__save_every": 3, "adapter__dropout": 0.3, "training__processes": 1}
    train(place, tmp_path / "whole", **how)

    class KilledError(Exception):
        pass

    def die(event: Any) -> None:
        if getattr(event, "step", 0) == 8:
            raise KilledError

    chosen = {"training__objective": "dpo", "data__valid": str(place / "valid.jsonl"), "training__epochs": 4, **how}
    loaded = settings(place / "model", place / "rows.jsonl", **chosen)
    with without_reload_check():
        with pytest.raises(KilledError):
            fine_tune(loaded, output=tmp_path / "killed", listener=die)
        fine_tune(loaded, output=tmp_path / "killed", resume=True)
    assert (tmp_path / "killed" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_run_on_pairs_goes_on_from_an_adapter(place: Path, tmp_path: Path) -> None:
    """An adapter that goes on is its own reference: its first loss is ln 2, though it is far from its base."""
    train(place, tmp_path / "first")
    found = train(place, tmp_path / "second", model=tmp_path / "first")
    assert found["losses"]["train"][0]["loss"] == pytest.approx(math.log(2), abs=1e-9)
    assert found["losses"]["fixed"][0]["loss"] == pytest.approx(math.log(2), abs=1e-9)


def test_whole_model_learns_pairs(place: Path, tmp_path: Path) -> None:
    """Without an adapter it is the same: the reference is the model before its first step."""
    found = train(place, tmp_path / "whole", adapter__kind="full", adapter__rank=8)
    assert found["losses"]["train"][0]["loss"] == pytest.approx(math.log(2), abs=1e-9)
    assert verdict(found, "preference-rows")["outcome"] == "passed"
