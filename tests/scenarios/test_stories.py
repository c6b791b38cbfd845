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
from finetune.verify.catalogue import catalogue
from finetune.verify.check import LawFailure
from finetune.verify.findings import Finding, load_finding, write_finding
from finetune.verify.stateful.deaths import Death
from finetune.verify.stateful.fork_server import ForkServer
from finetune.verify.stateful.stages import Resume, SpoilCheckpoint, Stage
from finetune.verify.stateful.story import RunStory
from finetune_strategies.profiles import examples
from finetune_strategies.recipes import TaskRecipe
from scenarios.test_artifact_store_machine import ArtifactStore
from scenarios.test_training_life_machine import HURRIED, TrainingLife
from support import faulty_trainers
from support.subjects import KEPT, Storyteller, runner

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
    "A164": ("course.same", killed),  # forgets the optimizer's averages
    "A164c": ("course.same", killed),  # forgets the dice
    "A160": ("course.same", killed),  # forgets the order of rows
    "A168b": ("resume.newest", killed),  # goes on from an older checkpoint
    "Early": ("checkpoints.whole", lambda: killed("power")),
    "A172": ("checkpoints.outlive", killed_again),  # removes the old ones first
    "A177": ("resume.damaged", spoiled),  # trusts damage
}
"""For each fault of a run the law that it breaks, and short stories in which it shows."""
STORE_LIES = ("A170", "A170b")
"""Step 9 is newer than step 10; the best step is lost."""


def named(liar: str) -> str:
    return f"{faulty_trainers.__name__}:{liar}"


def first_failure(liar: str, acts: Iterator[tuple[Stage, ...]]) -> Finding:
    """The first of these stories in which the liar fails a law."""
    for stages in acts:
        story = RunStory(task=SMALL, stages=stages)
        result = runner(named(liar)).run(story)
        assert result.outcome in ("passed", "failed"), result.why
        if result.failure is not None:
            law, plain = catalogue()[result.failure.law], runner(named(liar)).plain
            expected, got = plain(result.failure.expected), plain(result.failure.got)
            return Finding(law, story, named(liar), expected, got, stage=result.stage)
    raise AssertionError(f"{liar} was believed")


@pytest.mark.parametrize("liar", LIES)
def test_story_of_a_lie_fails_with_the_liar_and_passes_with_ours(liar: str, tmp_path: Path) -> None:
    """Each of 7 faults fails its law in a short story; ours passes the same story, read from its file."""
    assert len(LIES) == 7
    law, acts = LIES[liar]
    finding = first_failure(liar, acts())
    assert finding.law.id == law
    path = tmp_path / "finding.json"
    write_finding(finding, path)
    again = load_finding(path)
    assert again == finding
    assert str(runner(named(liar)).folder) not in path.read_text()
    assert isinstance(again.case, RunStory)
    passed = runner("reference").run(again.case, point=again.stage)
    assert (passed.outcome, passed.idle, passed.late) == ("passed", (), ())
    deaths = sum(isinstance(stage, Resume) and stage.death is not None for stage in again.case.stages)
    assert sum(count for _, count in passed.died) == deaths >= 1


def test_replay_knows_every_stage_in_a_process_of_its_own(tmp_path: Path) -> None:
    """`ft replay` as a user calls it: from its file alone a finding passes (0) on ours and fails (1) on a liar."""
    write_finding(first_failure("A164", LIES["A164"][1]()), tmp_path / "finding.json")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path])}
    for subject, code, word in (("reference", 0, "passed"), (named("A164"), 1, "failed")):
        words = ["replay", "finding.json", "--subject", subject]
        command = [sys.executable, "-c", "from finetune.cli import main; main()", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert (done.returncode, word in done.stdout) == (code, True), done.stderr


class OfARun(TrainingLife):
    """The machine, before a liar."""


class OfAStore(ArtifactStore):
    """The machine, before a liar."""


def found_by(machine: type[Storyteller], liar: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the machine has written down the smallest story in which the liar fails a law."""
    monkeypatch.setattr(machine, "subject", named(liar))
    found = settings(examples(of="fast"), phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False)
    monkeypatch.setattr(machine.TestCase, "settings", found)
    with pytest.raises(LawFailure) as caught:
        machine.TestCase("runTest").runTest()
    [note] = [note for note in caught.value.__notes__ if note.startswith("replay: ft replay ")]
    path = Path(note.removeprefix("replay: ft replay "))
    assert path.parent == KEPT
    return path


def test_machine_finds_each_lie_and_it_is_told_small(
    case: tuple[type[Storyteller], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A machine finds it and Hypothesis shrinks it to 3 stages at most; `ft replay` says failed, and of ours passed."""
    machine, liar = case
    monkeypatch.chdir(tmp_path)
    path = found_by(machine, liar, monkeypatch)
    small = load_finding(path)
    assert len(small.case.stages) <= 3, small.case  # type: ignore[attr-defined]
    if isinstance(small.case, RunStory):
        assert len(small.case.task.rows) <= 3
    assert run(["replay", str(path), "--subject", named(liar), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["outcome"], told["law"]) == ("failed", small.law.id)
    assert run(["replay", str(path), "--subject", "reference"]) == 0
    assert capsys.readouterr().out.startswith("passed: reference\n")


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
    """Where the stage at which it failed finds nothing to act on, nothing is judged: an error; a late death is told."""
    stages = (Resume(death=Death(100_000, "kill")), SpoilCheckpoint())
    story = RunStory(task=SMALL, stages=stages)
    path = tmp_path / "finding.json"
    write_finding(Finding(catalogue()["resume.damaged"], story, "reference", "", "", stage=2), path)
    assert run(["replay", str(path)]) == 4
    told = capsys.readouterr().out
    assert told.startswith("error: reference\n")
    assert "stage 2, at which the law failed, found nothing to act on" in told
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
    server = ForkServer([])
    try:
        ending = server.run("scenarios.test_stories:leave_children", [], tmp_path, None)
    finally:
        server.close()
    assert ending.code == 0, ending.stderr
    left = int(ending.answer)
    deadline = time.monotonic() + 60
    while alive(left) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(left)
