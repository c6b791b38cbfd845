"""A trainer's life, told as a story: begun, killed anywhere, gone on with, moved, spoiled, finished and measured.

The model is the run that nobody disturbed: whatever happens in between, the end has the same bytes, and at every
moment what lies on disk is a whole part of it. All is done by real processes, through the door of a subject.
"""

import shutil
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finetune.verify.deaths import Death
from finetune.verify.subjects import Look
from finetune_strategies.profiles import examples
from scenarios.subjects import CODES, TASKS, content, deaths, measured, ours, spoil, task, whole

pytestmark = pytest.mark.tier2
REFUSED = 3
OTHER_SETTINGS = {
    "training.learning_rate": 0.5, "training.seed": 1, "training.weight_decay": 0.1, "model.dtype": "bfloat16",
    "training.batch_size": 2,
}  # fmt: skip


class TrainingLife(RuleBasedStateMachine):
    """One run of one task."""

    backend: ClassVar = "reference"

    @initialize(name=st.sampled_from(sorted(TASKS)), death=deaths(100))
    def be_begun(self, name: str, death: Death) -> None:
        """Every story has a death at least."""
        self.begin(name)
        self.go_on(death)

    def begin(self, name: str) -> None:
        """Nothing is there yet."""
        self.subject, self.task, self.whole = ours(self.backend), task(name), whole(self.backend, name)
        self.root = Path(tempfile.mkdtemp())
        self.folder = self.root / "run"
        self.newest = 0
        self.lives = 0
        self.same_plan = True
        # What shows nothing new until another process has been at work.
        self.tried: set[str] = set()

    def teardown(self) -> None:
        """However the story went, it ends well."""
        if not hasattr(self, "root"):
            return
        try:
            # A story that has failed already, or that Hypothesis gives up, has no other end.
            if sys.exc_info()[0] is None:
                if not self.look.finished:
                    self.go_on(None)
                self.at_every_moment()
        finally:
            shutil.rmtree(self.root)

    @property
    def look(self) -> Look:
        """What lies there now."""
        return self.subject.look(self.folder)

    def unfinished(self) -> bool:
        """Whether there is anything left to do."""
        return not self.look.finished

    def resumable(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        look = self.look
        return bool(look.checkpoints) and not look.finished

    @precondition(unfinished)
    @rule(data=st.data())
    def be_killed(self, data: st.DataObject) -> None:
        """Begin or go on, and come to a sudden end."""
        self.go_on(data.draw(deaths(self.whole.changes, "kill", "power", "torn"), label="death"))

    @precondition(unfinished)
    @rule(data=st.data())
    def be_stopped(self, data: st.DataObject) -> None:
        """Begin or go on, and come to an end that can be told of."""
        self.go_on(data.draw(deaths(self.whole.changes, "interrupt", "full"), label="death"))

    @precondition(lambda self: self.lives > 2 and self.unfinished())
    @rule()
    def finish(self) -> None:
        """Go on, and be left alone."""
        self.go_on(None)

    def go_on(self, death: Death | None) -> None:
        """One process more; it ends as it was meant to, or finishes the run before."""
        self.tried.clear()
        self.lives += 1
        before = self.look
        if before.begun:
            ending = self.subject.resume(self.folder, death)
        else:
            ending = self.subject.train(self.task, self.folder, death)
        after = self.look
        assert "Traceback" not in ending.told, ending.told
        if after.finished:
            assert ending.code in (0, 1, *([CODES[death.by]] if death else [])), ending.told
            assert after.resumed[-1:] == ((self.newest,) if self.newest else ())
        else:
            assert death is not None, ending.told
            assert ending.code == CODES[death.by], ending.told
            if death.by == "full":
                assert "cannot write" in ending.told
            if death.by == "interrupt":
                self.check_last_words(ending.told, after)
        assert max(after.checkpoints, default=0) >= self.newest
        self.newest = max(after.checkpoints, default=0)

    def check_last_words(self, told: str, look: Look) -> None:
        """What an interrupted run says is left of it is what is left."""
        intact = f"the checkpoint of step {max(look.checkpoints, default=0)} is intact"
        assert (intact if look.checkpoints else "had been written yet") in told
        assert ("go on with: ft train --resume" in told) == look.begun

    @precondition(lambda self: self.folder.exists() and "move" not in self.tried)
    @rule()
    def move(self) -> None:
        """The folder is somewhere else from now on."""
        self.tried.add("move")
        self.folder = self.folder.rename(self.root / f"{self.folder.name}-moved")

    @precondition(lambda self: "ask" not in self.tried)
    @rule()
    def ask_for_what_cannot_be(self) -> None:
        """Beginning twice, resuming what is finished or was never begun, measuring what is not finished: refused."""
        self.tried.add("ask")
        look, before = self.look, content(self.folder)
        refused = []
        if look.begun:
            refused.append(self.subject.train(self.task, self.folder))
        if look.finished or not look.begun:
            refused.append(self.subject.resume(self.folder))
        if not look.finished:
            refused.append(self.subject.evaluate(self.folder))
        assert [ending.code for ending in refused] == [REFUSED] * len(refused), refused
        assert all("hint: " in ending.told for ending in refused)
        assert content(self.folder) == before

    @precondition(resumable)
    @rule(
        where=st.integers(0, 4_000), which=st.integers(0, 2), how=st.sampled_from(["flip", "cut"]), mend=st.booleans()
    )
    def spoil_the_newest(self, where: int, which: int, how: str, mend: bool) -> None:
        """A damaged checkpoint is refused by name and nothing is touched; mended or removed, the run can go on."""
        [folder] = self.folder.rglob(f"step-{self.newest:08d}")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        file = files[which % len(files)]
        old = file.read_bytes()
        spoil(file, where, how)
        wrong = {step: words for step, words in self.look.checkpoints.items() if words}
        assert list(wrong) == [self.newest]
        self.refuses(folder.name)
        if mend:
            file.write_bytes(old)
        else:
            shutil.rmtree(folder)
            self.newest = max(self.look.checkpoints, default=0)

    @precondition(resumable)
    @rule(key=st.sampled_from(sorted(OTHER_SETTINGS)))
    def resume_as_another(self, key: str) -> None:
        """With a setting changed that changes weights, going on is refused by its name."""
        kept = self.root / "kept"
        shutil.copytree(self.folder, kept)
        self.subject.change(self.folder, key, OTHER_SETTINGS[key])
        self.refuses(key)
        shutil.rmtree(self.folder)
        kept.rename(self.folder)

    def refuses(self, named: str) -> None:
        """The run cannot be gone on with: something is named, and all stays as it is."""
        before = content(self.folder)
        ending = self.subject.resume(self.folder)
        assert ending.code == REFUSED, ending.told
        assert named in ending.told
        assert "hint: " in ending.told
        assert content(self.folder) == before

    @precondition(resumable)
    @rule(rhythm=st.integers(1, 4))
    def save_in_another_rhythm(self, rhythm: int) -> None:
        """How often is saved may change; the weights do not."""
        self.subject.change(self.folder, "training.save_every", rhythm)
        self.same_plan = False

    @precondition(lambda self: self.look.finished and "measure" not in self.tried)
    @rule()
    def measure(self) -> None:
        """A finished run measures as one that nobody disturbed."""
        self.tried.add("measure")
        assert measured(self.subject.evaluate(self.folder)) == self.whole.measured

    @precondition(lambda self: self.look.finished)
    @rule(where=st.integers(0, 4_000), which=st.integers(0, 9), how=st.sampled_from(["flip", "cut"]))
    def spoil_what_was_saved(self, where: int, which: int, how: str) -> None:
        """What was trained is not used once it is damaged, and the file is named."""
        # A model card is for people, who may change it.
        saved = [name for name in self.look.names if name.startswith(("adapter/", "model/")) and "README" not in name]
        name = saved[which % len(saved)]
        old = (self.folder / name).read_bytes()
        spoil(self.folder / name, where, how)
        assert self.look.damaged == (name,)
        ending = self.subject.evaluate(self.folder)
        assert (ending.code, name.split("/")[-1] in ending.told) == (REFUSED, True), ending.told
        (self.folder / name).write_bytes(old)

    @invariant()
    def at_every_moment(self) -> None:
        """What is listed is whole, what is told is how it was without trouble, and what is finished is the same."""
        if not hasattr(self, "root"):
            return
        look, model = self.look, self.whole.look
        assert set(look.checkpoints.values()) <= {""}
        assert look.course == model.course[: len(look.course)]
        steps = [event["step"] for event in look.course if event["event"] == "StepDone"]
        assert max(look.checkpoints, default=0) <= max(steps, default=0)
        assert look.damaged == ()
        if look.finished:
            assert look.course == model.course
            # With another rhythm other checkpoints are left, and the plan says so.
            mutable = () if self.same_plan else ("checkpoints/", "plan")
            assert without(look.files, mutable) == without(model.files, mutable)
            assert [*without(dict.fromkeys(look.names), mutable)] == [*without(dict.fromkeys(model.names), mutable)]
            mutable = () if self.same_plan else ("plan", "notes")
            assert without(look.record, mutable) == without(model.record, mutable)


def without(values: Mapping[str, Any], starts: tuple[str, ...]) -> dict[str, Any]:
    """What there is under names that start with none of these."""
    return {name: value for name, value in values.items() if not name.startswith(starts)}


# Each rule is a process or two, and a short story can have several deaths.
TrainingLife.TestCase.settings = settings(examples(1 / 4), stateful_step_count=settings().stateful_step_count // 2)
test_training_life_ends_as_if_nothing_had_happened = TrainingLife.TestCase


HURRIED = settings.get_current_profile_name().startswith("fast")


def test_training_life_goes_on_after_a_power_cut_at_every_change() -> None:
    """P-CRASH, P-RESUME: at whichever change to its folder a run dies, it goes on to the end it would have had.

    In a hurry only the last changes are tried, when a run says that it is finished.
    """
    count = whole("reference", "plain").changes
    assert count > 80
    for after in range(count - 3 if HURRIED else 0, count):
        story = TrainingLife()
        story.begin("plain")
        story.go_on(Death(after, "power"))
        story.at_every_moment()
        story.teardown()


class TorchLife(TrainingLife):
    """The same with torch."""

    backend: ClassVar = "torch"


class MlxLife(TrainingLife):
    """The same with MLX."""

    backend: ClassVar = "mlx"


def with_framework(machine: type[TrainingLife], *modules: str) -> Any:
    """The machine's test, of few stories: loading a saved adapter with a framework takes many seconds each time."""
    machine.TestCase.settings = examples(1 / 50)
    missing = [module for module in modules if find_spec(module) is None]
    hurried = pytest.mark.skipif(HURRIED, reason="takes a minute: HYPOTHESIS_PROFILE=ci has time for it")
    extra = pytest.mark.skipif(bool(missing), reason=f"needs the {machine.backend} extra: {', '.join(missing)} missing")
    return extra(hurried(machine.TestCase))


test_training_life_with_torch = with_framework(TorchLife, "torch", "transformers", "peft")
test_training_life_with_mlx = with_framework(MlxLife, "mlx", "mlx_lm")
