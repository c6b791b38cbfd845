"""Laws of a run's record that was changed or damaged: it is read as it was written, or refused by the place."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import OutputError
from finetune.report import build_report
from finetune.run.folder import RunFolder
from support.sample_run import sample_run

WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "artifacts.0.path": lambda run: run["artifacts"][0].update(path={"a": "b"}),
    "artifacts.1": lambda run: run["artifacts"].insert(1, None),
    "losses.train.3": lambda run: run["losses"]["train"].insert(3, "x"),
    "losses.fixed.0.step": lambda run: run["losses"]["fixed"][0].update(step=10**200),
    "scores.learning.base.answers.0": lambda run: run["scores"]["learning"]["base"]["answers"].insert(0, []),
    "plan.0": lambda run: run["plan"].insert(0, 7),
    "data.train.lengths.steps.0.1": lambda run: run["data"]["train"]["lengths"]["steps"].insert(0, [1, "x"]),
    "not_measured.learning": lambda run: run["not_measured"].update(learning=3),
    "verdicts.0.outcome": lambda run: run["verdicts"][0].update(outcome="fine"),
    "model.parameters": lambda run: run["model"].update(parameters=[]),
}


@pytest.mark.parametrize("place", WRONG)
def test_record_with_a_wrong_value_is_refused_by_its_place(place: str, tmp_path: Path) -> None:
    """No reader of run.json meets a value of another type: the one error names where it stands."""
    run = copy.deepcopy(sample_run())
    WRONG[place](run)
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(OutputError, match=rf"run\.json is broken: .*{re.escape(place)}: ") as caught:
        RunFolder(tmp_path).read_manifest()
    assert caught.value.hint


def test_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Every value comes back, those that this version does not know among them."""
    run = sample_run(more={"a": [1, None, "x"]})
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert RunFolder(tmp_path).read_manifest() == run


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(min(len(value), 3)))
    below = [_places(value[key]) for key in keys if isinstance(value[key], dict | list)]
    return [(value, key) for key in keys] + [place for places in below for place in places]


@given(st.data(), st.sampled_from([None, [], {}, "x", "", 3, -1, 1.5, True, float("nan"), 10**200, ["x"], {"a": 1}]))
def test_record_with_any_value_is_refused_or_reported(data: st.DataObject, value: object) -> None:
    """What `read_manifest` lets through, a report can be made of."""
    from finetune.run.manifest import check_manifest

    run = copy.deepcopy(sample_run())
    owner, key = data.draw(st.sampled_from(_places(run)))
    owner[key] = value
    try:
        check_manifest(run)
    except ValueError:
        return
    json.dumps(build_report(run), allow_nan=False)
