"""Laws of findings of stories: what a file says is what is told, and whatever is wrong with it is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.cli.app import run
from finetune.errors import UsageError
from finetune.verify.catalogue import catalogue
from finetune.verify.check import LawFailure, check_same
from finetune.verify.findings import Finding, load_finding, write_finding
from finetune.verify.stateful.deaths import Death
from finetune.verify.stateful.lives import Order
from finetune.verify.stateful.runner import build_task
from finetune.verify.stateful.stages import Measure, Move, Resume, SaveInAnotherRhythm, Stage, Work
from finetune.verify.stateful.story import RunStory, StoreStory
from finetune.verify.subjects.subject import About, InProcessSubject
from finetune_strategies.profiles import examples
from finetune_strategies.recipes import ModelRecipe, TaskRecipe
from finetune_strategies.scratch import empty_folder

pytestmark = pytest.mark.tools

LAW = "course.same"


def stages() -> st.SearchStrategy[Stage]:
    dying = st.builds(Death, st.integers(0, 300), st.sampled_from(["kill", "power", "torn", "interrupt", "full"]))
    return st.one_of(
        st.builds(lambda death: Resume(death=death), st.none() | dying),
        st.just(Move()),
        st.just(Measure()),
        st.builds(lambda rhythm: SaveInAnotherRhythm(rhythm=rhythm), st.integers(1, 9)),
    )


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "training.epochs": st.floats(1, 4),
        "training.batch_size": st.integers(1, 9),
        "adapter.rank": st.integers(1, 5),
        "adapter.dropout": st.floats(0, 0.5),
        "template.name": st.just("chatml"),
    },
)
TEXTS = st.text(max_size=8)


@st.composite
def findings(draw: st.DrawFn) -> Finding:
    """A run, and the stage at which it failed a law."""
    rows = draw(st.lists(st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS}), min_size=1, max_size=6))
    model = ModelRecipe(layers=draw(st.integers(1, 3)), hidden=draw(st.integers(1, 20)), seed=draw(st.integers(0, 9)))
    task = TaskRecipe(model=model, rows=tuple(rows), settings=draw(SETTINGS))
    acts = draw(st.lists(stages(), min_size=1, max_size=6))
    story = RunStory(task=task, stages=tuple(acts))
    return Finding(catalogue()[LAW], story, "reference", "a", "b", stage=len(acts), versions={"python": "3"})


@given(findings())
@examples(1)
def test_finding_of_a_story_is_the_same_after_being_written(finding: Finding) -> None:
    """What is read is what was written."""
    with empty_folder() as folder:
        write_finding(finding, folder / "finding.json")
        assert load_finding(folder / "finding.json") == finding


def test_finding_of_a_store_is_the_same_after_being_written(tmp_path: Path) -> None:
    """A store's orders and deaths, too."""
    work = Work(orders=(Order("save", 9, "a", best=9), Order("open", 9)), death=Death(3, "torn"))
    story = StoreStory(keep=2, stages=(work, Move()))
    finding = Finding(catalogue()["store.torn"], story, "reference", "a", "b", stage=1)
    write_finding(finding, tmp_path / "finding.json")
    assert load_finding(tmp_path / "finding.json") == finding


TASK: dict[str, Any] = {"rows": [{"prompt": "a", "completion": "b"}], "settings": {}}
STAGES: list[Any] = [{"do": "go on", "death": {"after": 3, "by": "kill"}}, {"do": "go on"}]
GOOD: dict[str, Any] = {
    "format": "finetune finding",
    "version": 2,
    "law": LAW,
    "statement": "",
    "subject": "reference",
    "stage": 2,
    "case": {"scene": "training", "task": TASK, "stages": STAGES},
    "expected": "a",
    "got": "b",
}
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "not a finding": ({"format": "x"}, {}, "format is 'x'"),
    "another version": ({"version": 1}, {}, "version 1"),
    "a stage that is none": ({}, {"stages": [{"do": "fly"}]}, "stages.0: Input tag 'fly'"),
    "a stage of another scene": ({}, {"stages": [{"do": "work"}]}, "stages.0: Input tag 'work'"),
    "a stage that is no mapping": ({}, {"stages": [7]}, "stages.0"),
    "an unknown part of a stage": ({}, {"stages": [{"do": "go on", "path": "../x"}]}, "go on.path: Extra inputs"),
    "an unknown part of a death": (
        {},
        {"stages": [{"do": "go on", "death": {"after": 1, "by": "kill", "x": 1}}]},
        "death.x",
    ),
    "a way to die that is none": ({}, {"stages": [{"do": "go on", "death": {"after": 1, "by": "age"}}]}, "death.by"),
    "a death before the beginning": (
        {},
        {"stages": [{"do": "go on", "death": {"after": -1, "by": "kill"}}]},
        "after -1",
    ),
    "too many stages": ({}, {"stages": [{"do": "move"}] * 201}, "at most 200"),
    "too large a model": ({}, {"task": {**TASK, "model": {"layers": 99}}}, "task.model.layers"),
    "heads that do not go together": ({}, {"task": {**TASK, "model": {"kv_heads": 3}}}, "evenly"),
    "no rows": ({}, {"task": {"rows": [], "settings": {}}}, "task.rows"),
    "a row too long": ({}, {"task": {"rows": [{"text": "a" * 3_000}], "settings": {}}}, "2000 characters"),
    "a file of one's own": ({}, {"task": {**TASK, "settings": {"data.valid": "/etc/passwd"}}}, "data.valid: leads"),
    "a template's file": ({}, {"task": {**TASK, "settings": {"template.name": "../a.jinja"}}}, "template.name"),
    "an unknown setting": ({}, {"task": {**TASK, "settings": {"training.rate": 1}}}, "training.rate"),
    "a setting's wrong value": ({}, {"task": {**TASK, "settings": {"training.seed": -1}}}, "seed"),
    "a run too long": ({}, {"task": {**TASK, "settings": {"training.max_steps": 10**9}}}, "at most 200"),
    "a law that is none": ({"law": "x.y"}, {}, "no law 'x.y'"),
    "a law that no story shows": ({"law": "loss.oracle"}, {}, "'loss.oracle' has no such cases"),
    "a stage too late": ({"stage": 3}, {}, "3 of 2 stages"),
    "more than a finding has": ({"run": "rm"}, {}, "run: Extra inputs"),
}


@pytest.mark.parametrize("what", BAD)
def test_finding_that_is_none_is_refused(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of 23 bad findings ends `ft replay` with 2, and is told by its place; the good one is read."""
    assert len(BAD) == 23
    path = tmp_path / "finding.json"
    path.write_text(json.dumps(GOOD))
    assert load_finding(path).stage == 2
    changes, of_case, told = BAD[what]
    path.write_text(json.dumps({**GOOD, "case": {**GOOD["case"], **of_case}, **changes}))
    assert run(["replay", str(path)]) == 2
    words = capsys.readouterr().err
    assert told in words
    assert str(path) in words or what == "a law that no story shows"


def test_finding_is_told_all_its_problems_at_once(tmp_path: Path) -> None:
    """Five problems of one story are told in one go."""
    path = tmp_path / "finding.json"
    task = {"rows": [], "settings": {"model.path": "/etc", "tracking.to": ["wandb"]}, "model": {"hidden": 0}}
    case = {"scene": "training", "task": task, "stages": [{"do": "fly"}, {"do": "move", "to": "/"}], "more": 1}
    path.write_text(json.dumps({**GOOD, "case": case}))
    with pytest.raises(UsageError) as caught:
        load_finding(path)
    for place in ("task.rows", "task.model.hidden", "'fly'", "stages.1.move.to", "more"):
        assert place in caught.value.message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "JSON"),
        ('{"a": NaN}', "format"),
        ("[1]", "object"),
        ("[" * 100_000, "JSON"),
        (" " * 1_000_001, "1,000,001 bytes"),
    ],
)
def test_finding_file_of_anything_is_refused(text: str, told: str, tmp_path: Path) -> None:
    """What is no JSON, too deep or too large is refused; so are a folder and a file that is missing."""
    path = tmp_path / "finding.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=told):
        load_finding(path)
    for nothing in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(UsageError, match="cannot be read"):
            load_finding(nothing)


class Mute(InProcessSubject):
    """A subject that can do nothing."""

    def __init__(self) -> None:
        super().__init__(About("mute", {"it": "1"}, {}), {}, [])


class OutOfOrder(InProcessSubject):
    """A subject whose every act goes wrong in itself."""

    def __init__(self) -> None:
        def fails(**given: Any) -> dict[str, Any]:
            raise RuntimeError("out of order")

        handlers = {"store_process": fails, "list_checkpoints": fails}
        super().__init__(About("failed", {"it": "1"}, dict.fromkeys(handlers, "")), handlers, [])


def test_story_that_a_subject_unservable_reason_is_not_applicable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing ability is named, and ends with 3; trouble that is no failed law is an error, and ends with 4."""
    path = tmp_path / "finding.json"
    case = {"scene": "checkpoints", "keep": 2, "stages": [{"do": "work", "orders": [{"do": "release"}]}]}
    path.write_text(json.dumps({**GOOD, "law": "store.torn", "stage": 1, "case": case}))
    for name, code, word in (("Mute", 3, "store_process: it has no such"), ("OutOfOrder", 4, "out of order")):
        assert run(["replay", str(path), "--subject", f"{__name__}:{name}"]) == code
        told = capsys.readouterr()
        assert word in told.out + told.err


@pytest.mark.parametrize("name", ["nobody", "json:nothing", "no_such_module:x", "json:dumps", ":x", "builtins:dict"])
def test_subject_that_is_none_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no subject ends with 2, named; and no file decides what is imported."""
    path = tmp_path / "finding.json"
    path.write_text(json.dumps(GOOD))
    assert run(["replay", str(path), "--subject", name]) == 2
    assert repr(name) in capsys.readouterr().err
    path.write_text(json.dumps({**GOOD, "subject": name}))
    assert run(["replay", str(path)]) == 2
    assert f"--subject {name}" in capsys.readouterr().err


def test_failures_are_told_apart_by_their_type() -> None:
    """Each law fails with a type of its own, that says expected and got, of mappings only what differs."""
    kinds = set()
    laws = [law.id for law in catalogue().values() if law.scene]
    for law in laws:
        with pytest.raises(LawFailure) as caught:
            check_same({"same": 1, "other": 2}, {"same": 1, "more": 3}, law=law)
        assert (caught.value.expected, caught.value.got) == ("{'other': 2}", "{'more': 3}")
        kinds.add(caught.type)
    assert len(kinds) == len(laws) >= 30


def test_story_measures_nothing_of_the_machine(tmp_path: Path) -> None:
    """A story that says nothing of extra runs has none: what they measure is another number each time."""
    task = build_task(TaskRecipe(rows=({"prompt": "a", "completion": "1"},), settings={}), tmp_path / "task")
    assert (task.settings["judge.control"], task.settings["judge.memory"]) == ("never", "never")
