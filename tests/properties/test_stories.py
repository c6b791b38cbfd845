"""Laws of stories: what a file says is what is told, whatever is wrong is told at once, and smaller is smaller."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import finetune
from finetune.cli.app import run
from finetune.errors import UsageError
from finetune.verify.checkpoint_stages import StoreStage, Work
from finetune.verify.deaths import Death
from finetune.verify.laws import LAWS, LawBrokenError, check_law_same
from finetune.verify.minimise import lower, minimise, same_break, shorter, weight
from finetune.verify.recipes import ModelRecipe, TaskRecipe
from finetune.verify.stages import Stage, stages_of
from finetune.verify.stories import Origin, StageFinding, StoreScene, Story, TrainingScene, load_story, parse_story
from finetune.verify.subjects import Order
from finetune.verify.theatre import StoryResult, run_story
from finetune.verify.training_stages import Measure, Move, Resume, SaveInAnotherRhythm, TrainingStage
from finetune_strategies.profiles import examples

pytestmark = pytest.mark.tools

LAW = "course.same"


def found(stage: int, law: str = LAW) -> StageFinding:
    return StageFinding(law=law, statement=LAWS[law].statement, stage=stage, expected="a", got="b")


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
def stories(draw: st.DrawFn) -> Story:
    """Stories of a run that broke at their last stage."""
    rows = draw(st.lists(st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS}), min_size=1, max_size=6))
    model = ModelRecipe(layers=draw(st.integers(1, 3)), hidden=draw(st.integers(1, 20)), seed=draw(st.integers(0, 9)))
    task = TaskRecipe(model=model, rows=tuple(rows), settings=draw(SETTINGS))
    acts = draw(st.lists(stages(), min_size=1, max_size=6))
    origin = Origin(subject="reference", versions={"python": "3"})
    return Story(setting=TrainingScene(task=task), stages=tuple(acts), broken=found(len(acts)), origin=origin)


@given(stories())
@examples(1)
def test_story_in_a_file_is_the_story(story: Story) -> None:
    """What is read is what was written, to the letter."""
    again, problems = parse_story(json.loads(story.text))
    assert (again, problems) == (story, ())
    assert again is not None
    assert again.text == story.text


def faulty(story: Story) -> bool:
    """A pure stand-in: breaks with a killed life followed by another, two rows and a rank above 1."""
    assert isinstance(story.setting, TrainingScene)
    task = story.setting.task
    kills = [n for n, each in enumerate(story.stages) if isinstance(each, Resume) and each.death]
    late = any(stage.death.after >= 7 for stage in story.stages if isinstance(stage, Resume) and stage.death)
    return bool(kills) and late and len(task.rows) >= 2 and task.settings.get("adapter.rank", 1) >= 2


class Judge:
    """Judges by a predicate, and notes what it was told."""

    def __init__(self, predicate: Callable[[Story], bool]) -> None:
        self.predicate = predicate
        self.told: list[str] = []

    def __call__(self, story: Story) -> StageFinding | None:
        self.told.append(story.text.partition('"broken"')[0])
        return found(len(story.stages)) if self.predicate(story) else None


@given(stories())
@examples(1)
def test_minimise_finds_the_smallest_and_tells_nothing_twice(story: Story) -> None:
    """The result breaks, is no larger, is the known minimum, and made smaller again it stays as it is."""
    if not faulty(story):
        story = story.model_copy(update={"stages": (*story.stages, Resume(death=Death(90, "kill")))})
        assert isinstance(story.setting, TrainingScene)
        task = story.setting.task
        more = TaskRecipe(model=task.model, rows=task.rows * 2, settings={**task.settings, "adapter.rank": 5})
        story = story.model_copy(update={"setting": TrainingScene(task=more)})
    judge = Judge(faulty)
    done = minimise(story, judge)
    assert done.finished
    assert faulty(done.story)
    assert weight(done.story) <= weight(story)
    assert len(judge.told) == len(set(judge.told)) == done.tried
    assert story.text.partition('"broken"')[0] not in judge.told
    [stage] = done.story.stages
    assert isinstance(stage, Resume)
    assert stage.death is not None
    assert stage.death.after == 7
    assert isinstance(done.story.setting, TrainingScene)
    small = done.story.setting.task
    smallest = ModelRecipe(layers=1, hidden=1, heads=1, kv_heads=1, head_size=2, intermediate=1, seed=0)
    assert (len(small.rows), small.model, small.settings["adapter.rank"]) == (2, smallest, 2)
    assert set(small.settings) <= {"adapter.rank", "training.epochs", "training.batch_size"}
    again = minimise(done.story, Judge(faulty))
    assert again.story == done.story


def test_minimise_moves_a_death_with_the_rows() -> None:
    """Where a death shows at one step only, fewer rows and an earlier death come together."""

    def at_its_step(story: Story) -> bool:
        assert isinstance(story.setting, TrainingScene)
        deaths = [stage.death.after for stage in story.stages if isinstance(stage, Resume) and stage.death]
        return len(story.setting.task.rows) > 1 and 10 * len(story.setting.task.rows) in deaths

    task = TaskRecipe(rows=({"text": "a"},) * 11, settings={})
    stages = (Resume(death=Death(110, "kill")), Resume())
    story = Story(setting=TrainingScene(task=task), stages=stages, broken=found(2), origin=Origin(subject="reference"))
    done = minimise(story, Judge(at_its_step))
    assert isinstance(done.story.setting, TrainingScene)
    assert len(done.story.setting.task.rows) == 2
    assert done.story.stages == (Resume(death=Death(20, "kill")),)


def test_minimise_leaves_out_what_comes_after_the_break() -> None:
    """Of a candidate that breaks earlier only what was told until then is kept, at once."""
    task = TaskRecipe(rows=({"text": "a"},), settings={})
    stages = (Resume(), Move(), Measure(), Resume(), Move())
    story = Story(setting=TrainingScene(task=task), stages=stages, broken=found(5), origin=Origin(subject="reference"))
    ticks = iter(range(9))
    done = minimise(story, lambda candidate: found(1), seconds=2, clock=lambda: next(ticks))
    assert (done.tried, len(done.story.stages), done.story.broken) == (1, 1, found(1))


@given(stories(), st.integers(0, 12))
@examples(1 / 2)
def test_minimise_ends_in_time_with_the_best_so_far(story: Story, seconds: int) -> None:
    """When its time is up it says so; what it hands on breaks all the same, and is what was found last."""
    ticks = iter(range(10_000))
    judge = Judge(lambda each: True)
    done = minimise(story, judge, seconds=seconds, clock=lambda: next(ticks))
    assert done.tried == len(judge.told) <= seconds
    if not done.finished:
        assert done.tried <= seconds
        expected = judge.told[-1] if judge.told else story.text.partition('"broken"')[0]
        assert done.story.text.partition('"broken"')[0] == expected


@given(st.lists(st.integers(), max_size=9).map(tuple), st.integers(0, 99), st.integers(0, 99))
@examples(1 / 2)
def test_candidates_are_smaller_and_miss_no_single_step(items: tuple[int, ...], number: int, least: int) -> None:
    """Each candidate list is shorter, each number lower; leaving out any one item, or one less, is among them."""
    smaller = list(shorter(items))
    assert all(len(each) < len(items) for each in smaller)
    assert {items[:at] + items[at + 1 :] for at in range(len(items)) if len(items) > 1} <= set(smaller)
    numbers = list(lower(number, least))
    assert all(least <= each < number for each in numbers)
    assert numbers == [] if number <= least else (numbers[0], numbers[-1]) == (least, number - 1)


def test_same_break_of_an_undisturbed_run_gives_the_same_reason() -> None:
    """Numbers and paths may differ; another error is another failure."""
    task = TaskRecipe(rows=({"text": "a"},), settings={})

    def dead(words: str) -> StageFinding:
        return found(0, "run.ends").model_copy(update={"got": f"code 1: load\n{words}\n  hint: mend it"})

    wanted = dead("error: checkpoint /tmp/a/step-3 is damaged")
    story = Story(setting=TrainingScene(task=task), stages=(), broken=wanted, origin=Origin(subject="reference"))
    for words, same in (("checkpoint /x/step-14 is damaged", True), ("the loss became nan at step 3", False)):
        finding = dead(f"error: {words}")
        assert (same_break(story, story, StoryResult("broken", finding)) == finding) is same


def test_same_break_is_the_same_law_at_the_same_kind_of_stage() -> None:
    """Another law, or the same one at another kind of stage, is another failure."""
    task = TaskRecipe(rows=({"text": "a"},), settings={})
    origin = Origin(subject="reference")
    story = Story(setting=TrainingScene(task=task), stages=(Move(), Resume()), broken=found(2), origin=origin)
    assert same_break(story, story, StoryResult("broken", found(2))) == found(2)
    assert same_break(story, story, StoryResult("broken", found(1))) is None
    assert same_break(story, story, StoryResult("broken", found(2, "end.files"))) is None
    assert same_break(story, story, StoryResult("kept")) is None
    shorter_one = story.model_copy(update={"stages": (Resume(),)})
    assert same_break(story, shorter_one, StoryResult("broken", found(1))) == found(1)


GOOD: dict[str, Any] = {
    "format": "finetune story",
    "version": 1,
    "scene": "training",
    "task": {"rows": [{"prompt": "a", "completion": "b"}], "settings": {}},
    "stages": [{"do": "go on", "death": {"after": 3, "by": "kill"}}, {"do": "go on"}],
    "broken": found(2).model_dump(),
    "origin": {"subject": "reference"},
}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "not a story": ({"format": "x"}, "format"),
    "another version": ({"version": 2}, "version: 2"),
    "a stage that is none": ({"stages": [{"do": "fly"}]}, "stage 1: there is no stage 'fly'"),
    "a stage of another scene": ({"stages": [{"do": "work"}]}, "no stage 'work' in this scene"),
    "a stage that is no mapping": ({"stages": ["go on", 7]}, "stage 2: there is no stage 7"),
    "an unknown part of a stage": ({"stages": [{"do": "go on", "path": "../x"}]}, "stage 1.path: Extra inputs"),
    "an unknown part of a death": ({"stages": [{"do": "go on", "death": {"after": 1, "by": "kill", "x": 1}}]}, "x:"),
    "a way to die that is none": ({"stages": [{"do": "go on", "death": {"after": 1, "by": "age"}}]}, "death.by"),
    "a death before the beginning": ({"stages": [{"do": "go on", "death": {"after": -1, "by": "kill"}}]}, "after -1"),
    "too many stages": ({"stages": [{"do": "move"}] * 201}, "at most 200"),
    "too large a model": ({"task": {**GOOD["task"], "model": {"layers": 99}}}, "task.model.layers"),
    "heads that do not go together": ({"task": {**GOOD["task"], "model": {"kv_heads": 3}}}, "evenly"),
    "no rows": ({"task": {"rows": [], "settings": {}}}, "task.rows"),
    "a row too long": ({"task": {"rows": [{"text": "a" * 3_000}], "settings": {}}}, "2000 characters"),
    "a file of one's own": ({"task": {**GOOD["task"], "settings": {"data.valid": "/etc/passwd"}}}, "data.valid: leads"),
    "a template's file": ({"task": {**GOOD["task"], "settings": {"template.name": "../a.jinja"}}}, "template.name"),
    "an unknown setting": ({"task": {**GOOD["task"], "settings": {"training.rate": 1}}}, "training.rate"),
    "a setting's wrong value": ({"task": {**GOOD["task"], "settings": {"training.seed": -1}}}, "seed"),
    "a run too long": ({"task": {**GOOD["task"], "settings": {"training.max_steps": 10**9}}}, "at most 200"),
    "a law that is none": ({"broken": {**GOOD["broken"], "law": "x.y"}}, "no law 'x.y'"),
    "a stage too late": ({"broken": {**GOOD["broken"], "stage": 3}}, "3 of 2 stages"),
    "more than a story has": ({"run": "rm"}, "run: no story has this"),
}


@pytest.mark.parametrize("what", BAD)
def test_story_that_is_none_is_refused(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 22 bad stories ends `ft replay` with 2, and is told by its place; the good one is read."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert len(BAD) == 22
    assert parse_story(GOOD)[1] == ()
    changes, told = BAD[what]
    path = tmp_path / "story.json"
    path.write_text(json.dumps({**GOOD, **changes}))
    assert run(["replay", str(path)]) == 2
    words = capsys.readouterr().err
    assert told in words
    assert str(path) in words


def test_story_is_told_all_its_problems_at_once(tmp_path: Path) -> None:
    """Six problems in one file are told in one go."""
    path = tmp_path / "story.json"
    task = {"rows": [], "settings": {"model.path": "/etc", "tracking.to": ["wandb"]}, "model": {"hidden": 0}}
    bad = {**GOOD, "task": task, "stages": [{"do": "fly"}, {"do": "move", "to": "/"}], "more": 1}
    path.write_text(json.dumps(bad))
    with pytest.raises(UsageError) as caught:
        load_story(path)
    for place in ("task.rows", "task.model.hidden", "'fly'", "stage 2.to", "more"):
        assert place in caught.value.message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ('{"a": NaN}', "NaN"),
        ("[1]", "format"),
        ("[" * 100_000, "not JSON"),
        (" " * 1_000_001, "1,000,001 bytes"),
    ],
)
def test_story_file_of_anything_is_refused(text: str, told: str, tmp_path: Path) -> None:
    """What is no JSON, too deep or too large is refused; so are a folder and a file that is missing."""
    path = tmp_path / "story.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=told):
        load_story(path)
    for nothing in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(UsageError, match="cannot be read"):
            load_story(nothing)


class Mute:
    """A subject that can do nothing."""

    name = "mute"


class Broken:
    """A subject whose every act goes wrong in itself."""

    name = "broken"

    def obey(self, *given: Any) -> Any:
        raise RuntimeError("out of order")

    listed = obey


def test_story_that_a_subject_cannot_be_told_is_not_applicable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing ability is named, and ends with 3; trouble that is no broken law is an error, and ends with 4."""
    store = {**GOOD, "scene": "checkpoints", "keep": 2, "broken": None, "stages": [{"do": "work", "orders": []}]}
    del store["task"]
    assert "orders" in parse_story(store)[1][0]
    store["stages"] = [{"do": "work", "orders": [{"do": "release"}]}]
    for name, code, word in (("Mute", 3, "KeepsCheckpoints"), ("Broken", 4, "out of order")):
        path = tmp_path / "story.json"
        path.write_text(json.dumps(store))
        assert run(["replay", str(path), "--subject", f"{__name__}:{name}"]) == code
        told = capsys.readouterr()
        assert word in told.out + told.err
    story, _ = parse_story(GOOD)
    assert story is not None
    assert run_story(story, Mute()).verdict == "not applicable"


@pytest.mark.parametrize("name", ["nobody", "json:nothing", "no_such_module:x", "json:dumps", ":x", "builtins:dict"])
def test_subject_that_is_none_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no subject ends with 2, named; and no file decides what is imported."""
    path = tmp_path / "story.json"
    path.write_text(json.dumps(GOOD))
    assert run(["replay", str(path), "--subject", name]) == 2
    assert repr(name) in capsys.readouterr().err
    path.write_text(json.dumps({**GOOD, "origin": {"subject": name}}))
    assert run(["replay", str(path)]) == 2
    assert f"--subject {name}" in capsys.readouterr().err


def test_laws_are_all_in_use_and_none_is_made_up() -> None:
    """Every law's id stands in a demand of the product, and every demand's id is a law's: at least 30 of them."""
    used = set()
    for file in (Path(finetune.__file__).parent / "verify").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and file.name != "laws.py":
                used |= {
                    each.value
                    for each in node.args[:1]
                    if isinstance(each, ast.Constant) and isinstance(each.value, str) and "." in each.value
                    if getattr(node.func, "id", getattr(node.func, "attr", ""))
                    in ("check_law", "check_law_same", "refuses")
                }
    assert used == set(LAWS)
    assert len(LAWS) >= 30
    assert all(law.id == id and law.statement.endswith(".") for id, law in LAWS.items())


def test_broken_laws_are_told_apart_by_their_type() -> None:
    """Each law breaks with a type of its own, that says expected and got, of mappings only what differs."""
    kinds = set()
    for law in LAWS:
        with pytest.raises(LawBrokenError) as caught:
            check_law_same(law, {"same": 1, "other": 2}, {"same": 1, "more": 3})
        assert (caught.value.expected, caught.value.got) == ("{'other': 2}", "{'more': 3}")
        kinds.add(caught.type)
    assert len(kinds) == len(LAWS)


def test_stages_have_names_of_their_own() -> None:
    """Every stage of both scenes is known by its name: 8 for a run, 5 for a store."""
    for scene, kind, count in (("training", TrainingStage, 8), ("checkpoints", StoreStage, 5)):
        known = stages_of(scene)
        assert len(known) == count
        assert set(known.values()) == set(kind.__subclasses__())
    work = Work(orders=(Order("save", 9, "a"),))
    story = Story(setting=StoreScene(keep=2), stages=(work,), origin=Origin(subject="reference"))
    assert parse_story(json.loads(story.text))[0] == story


def test_story_measures_nothing_of_the_machine(tmp_path: Path) -> None:
    """A story that says nothing of extra runs has none: what they measure is another number each time."""
    task = TaskRecipe(rows=({"prompt": "a", "completion": "1"},), settings={}).build(tmp_path / "task")
    assert (task.settings["judge.sham"], task.settings["judge.memory"]) == ("never", "never")
