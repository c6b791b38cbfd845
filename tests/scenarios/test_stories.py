"""Laws of replay, held against trainers that lie: each lie is found, told small, and told of ours it is none."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import Phase, settings

from finetune.cli.app import run
from finetune.verify.deaths import Death
from finetune.verify.laws import LawBrokenError
from finetune.verify.nursery import ForkServer
from finetune.verify.recipes import TaskRecipe
from finetune.verify.stages import Stage
from finetune.verify.stories import StageFinding, Story, TrainingScene, load_story, origin_of, save_story
from finetune.verify.theatre import StoryResult
from finetune.verify.training_stages import Resume, SpoilCheckpoint
from finetune_strategies.profiles import examples
from scenarios.test_artifact_store_machine import ArtifactStore
from scenarios.test_training_life_machine import HURRIED, TrainingLife
from support import faulty_trainers
from support.subjects import KEPT, Storyteller, theatre

pytestmark = pytest.mark.tier2
SMALL = TaskRecipe(
    rows=({"prompt": "a", "completion": "1"}, {"prompt": "bb", "completion": "2"}, {"prompt": "c", "completion": "3"}),
    settings={
        "training.epochs": 2.0,
        "training.batch_size": 2,
        "training.save_every": 1,
        "adapter.rank": 1,
        "adapter.dropout": 0.2,
        "training.learning_rate": 0.01,
    },
)
END = Resume()
EVERY = range(28, 90, 4)
"""Changes to a run's folder after the first checkpoint; the windows in which these lies show are wider."""


def killed(by: Any = "kill") -> Iterator[tuple[Stage, ...]]:
    """Ended by something once, and gone on with."""
    yield from ((Resume(death=Death(after, by)), END) for after in EVERY)


def killed_again() -> Iterator[tuple[Stage, ...]]:
    """Killed a second time, in the life that goes on."""
    yield from ((Resume(death=Death(28, "kill")), Resume(death=Death(after, "kill")), END) for after in range(8, 60, 4))


def spoiled() -> Iterator[tuple[Stage, ...]]:
    """Killed, and its checkpoint damaged."""
    yield from ((Resume(death=Death(after, "kill")), SpoilCheckpoint(where=9)) for after in EVERY)


LIES: dict[str, tuple[str, Any]] = {
    "ForgetsMoments": ("course.same", killed),
    "ForgetsDice": ("course.same", killed),
    "ForgetsOrder": ("course.same", killed),
    "GoesOnFromOlder": ("resume.newest", killed),
    "ReportsTooEarly": ("checkpoints.whole", lambda: killed("power")),
    "RemovesFirst": ("checkpoints.outlive", killed_again),
    "TrustsDamage": ("resume.refuses-damaged", spoiled),
}
"""For each lie about a run the law that it breaks, and short stories in which it shows."""
STORE_LIES = ("SortsByName", "LosesTheBest")


def named(liar: str) -> str:
    return f"{faulty_trainers.__name__}:{liar}"


def first_broken(liar: str, acts: Iterator[tuple[Stage, ...]]) -> tuple[Story, StoryResult]:
    """The first of these stories that the liar breaks."""
    for stages in acts:
        story = Story(setting=TrainingScene(task=SMALL), stages=stages, origin=origin_of(named(liar)))
        outcome = theatre(named(liar)).run(story)
        assert outcome.verdict in ("kept", "broken"), outcome.why
        if outcome.finding is not None:
            return story.model_copy(update={"broken": outcome.finding}), outcome
    raise AssertionError(f"{liar} was believed")


@pytest.mark.parametrize("liar", LIES)
def test_story_of_a_lie_is_broken_by_the_liar_and_kept_by_ours(liar: str, tmp_path: Path) -> None:
    """Each of 7 faults breaks its law in a short story; ours keeps the same story, read from its file."""
    assert len(LIES) == 7
    law, acts = LIES[liar]
    story, outcome = first_broken(liar, acts())
    assert outcome.finding is not None
    assert outcome.finding.law == law
    path = tmp_path / "story.json"
    save_story(story, path)
    again = load_story(path)
    assert again == story
    assert str(theatre(named(liar)).folder) not in path.read_text()
    kept = theatre("reference").run(again)
    assert (kept.verdict, kept.idle, kept.late) == ("kept", (), ())
    deaths = sum(isinstance(stage, Resume) and stage.death is not None for stage in story.stages)
    assert sum(count for _, count in kept.died) == deaths >= 1


def test_replay_knows_every_stage_in_a_process_of_its_own(tmp_path: Path) -> None:
    """`ft replay` as a user calls it: from its file alone a story is FIXED (0) on ours and BROKEN (1) on a liar."""
    story, _ = first_broken("ForgetsMoments", LIES["ForgetsMoments"][1]())
    save_story(story, tmp_path / "story.json")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    for subject, code, word in (("reference", 0, "FIXED"), (named("ForgetsMoments"), 1, "BROKEN")):
        words = ["replay", "story.json", "--subject", subject]
        command = [sys.executable, "-c", "from finetune.cli import main; main()", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert (done.returncode, word in done.stdout) == (code, True), done.stderr


class OfARun(TrainingLife):
    """The machine, before a liar."""


class OfAStore(ArtifactStore):
    """The machine, before a liar."""


def found_by(machine: type[Storyteller], liar: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the machine has written down how the liar broke a law."""
    monkeypatch.setattr(machine, "subject", named(liar))
    found = settings(examples(of="fast"), phases=[Phase.generate])
    monkeypatch.setattr(machine.TestCase, "settings", found)
    with pytest.raises(LawBrokenError) as caught:
        machine.TestCase("runTest").runTest()
    [note] = [note for note in caught.value.__notes__ if note.startswith("replay: ft replay ")]
    path = Path(note.removeprefix("replay: ft replay "))
    assert path.parent == KEPT
    return path


def test_machine_finds_each_lie_and_it_is_told_small(
    case: tuple[type[Storyteller], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A machine finds it, `ft replay` makes it small and calls it BROKEN, and FIXED when it is told to ours."""
    machine, liar = case
    monkeypatch.chdir(tmp_path)
    path = found_by(machine, liar, monkeypatch)
    before = load_story(path)
    assert before.broken is not None
    assert run(["replay", str(path), "--subject", named(liar), "--minimise", "--seconds", "400", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["outcome"] == "BROKEN"
    assert told["minimised"]["finished"]
    small = load_story(path.with_suffix(".min.json"))
    assert small.broken is not None
    assert small.broken.law == before.broken.law == told["law"]["law"]
    assert len(small.stages) <= min(3, len(before.stages))
    if isinstance(small.setting, TrainingScene):
        assert len(small.setting.task.rows) <= 3
        assert small.setting.task.model.layers == 1
    assert run(["replay", str(path.with_suffix(".min.json")), "--subject", named(liar)]) == 1
    words = capsys.readouterr().out
    assert words.startswith(f"BROKEN: {named(liar)}")
    assert small.broken.statement in words
    assert run(["replay", str(path.with_suffix(".min.json")), "--subject", "reference"]) == 0
    assert capsys.readouterr().out == "FIXED: reference\n"


@pytest.fixture(params=[*STORE_LIES, *LIES])
def case(request: pytest.FixtureRequest) -> tuple[type[Storyteller], str]:
    """A machine and the liar before it; those about runs take minutes, those about stores a moment."""
    liar = str(request.param)
    if liar in STORE_LIES:
        return OfAStore, liar
    if HURRIED:
        pytest.skip("takes minutes: HYPOTHESIS_PROFILE=ci has time for it")
    return OfARun, liar


def test_story_that_does_not_come_to_its_point_is_not_fixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the stage at which it broke finds nothing to act on, nothing is judged: ERROR, and a late death is told."""
    stages = (Resume(death=Death(100_000, "kill")), SpoilCheckpoint())
    finding = StageFinding(law="resume.refuses-damaged", statement="", stage=2, expected="", got="")
    story = Story(setting=TrainingScene(task=SMALL), stages=stages, broken=finding, origin=origin_of("reference"))
    path = tmp_path / "story.json"
    save_story(story, path)
    assert run(["replay", str(path)]) == 4
    told = capsys.readouterr().out
    assert told.startswith("ERROR: reference\n  stage 2, at which the law broke, found nothing to act on")
    assert "death never came: 1" in told


def leave_children() -> None:
    """A program that starts two others and ends: one holds its pipes open for a while, the other outlives everybody."""
    sleeper = [sys.executable, "-c", "import time; time.sleep({})"]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen([*sleeper[:2], sleeper[2].format(30)])
    print(subprocess.Popen([*sleeper[:2], sleeper[2].format(600)], **quiet).pid)


def alive(pid: int) -> bool:
    """Whether a process is still at work, not just remembered by the system."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_process_takes_along_what_it_had_started(tmp_path: Path) -> None:
    """When a process under test ends, nothing that it started is left."""
    nursery = ForkServer([])
    try:
        ending = nursery.run("scenarios.test_stories:leave_children", [], tmp_path, None)
    finally:
        nursery.close()
    assert ending.code == 0, ending.stderr
    left = int(ending.answer)
    deadline = time.monotonic() + 60
    while alive(left) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(left)
