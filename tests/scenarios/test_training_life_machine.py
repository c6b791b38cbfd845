"""A trainer's life, told as a story: begun, killed anywhere, gone on with, moved, spoiled, finished and measured.

The model is the run that nobody disturbed: whatever happens in between, the end has the same bytes, and at every
moment what lies on disk is a whole part of it. All is done by real processes, through the door of a subject; what is
done and which laws hold stands in `finetune.verify`, so that `ft replay` does and judges the same.
"""

import sys
from collections import Counter
from importlib.util import find_spec
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from finetune.verify.stateful.deaths import Death
from finetune.verify.stateful.stages import (
    OTHER_SETTINGS,
    AskForWhatCannotBe,
    Measure,
    Move,
    Resume,
    ResumeAsAnother,
    SaveInAnotherRhythm,
    SpoilCheckpoint,
    SpoilResult,
)
from finetune_strategies.profiles import stories
from support.subjects import ROWS, TASKS, Storyteller, deaths, runner, training

pytestmark = pytest.mark.tier2
PLACES = st.integers(0, 4_000)
HOW = st.sampled_from(["flip", "cut"])


class TrainingLife(Storyteller):
    """One run of one task."""

    @initialize(name=st.sampled_from(sorted(TASKS)), rows=st.sampled_from([3, len(ROWS)]), death=deaths(100))
    def be_begun(self, name: str, rows: int, death: Death) -> None:
        """Every story has a death at least."""
        self.begin_in(training(name, rows))
        # What shows nothing new until another process has been at work.
        self.tried: set[str] = set()
        self.resume(death)

    def teardown(self) -> None:
        """However the story went, it ends well."""
        # A story that has failed already, or that Hypothesis gives up, has no other end.
        try:
            if self.begun and sys.exc_info()[0] is None and self.unfinished():
                self.do(Resume())
        finally:
            super().teardown()

    def unfinished(self) -> bool:
        """Whether there is anything left to do."""
        return not self.world.look.finished

    def resumable(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return bool(self.world.resumable)

    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return not self.unfinished()

    def resume(self, death: Death | None) -> None:
        """One process more."""
        self.tried.clear()
        self.do(Resume(death=death))

    @precondition(unfinished)
    @rule(data=st.data())
    def be_killed(self, data: st.DataObject) -> None:
        """Begin or go on, and come to a sudden end."""
        self.resume(data.draw(deaths(self.world.whole.changes, "kill", "power", "torn"), label="death"))

    @precondition(unfinished)
    @rule(data=st.data())
    def be_stopped(self, data: st.DataObject) -> None:
        """Begin or go on, and come to an end that can be told of."""
        self.resume(data.draw(deaths(self.world.whole.changes, "interrupt", "full"), label="death"))

    @precondition(lambda self: self.world.lives > 2 and self.unfinished())
    @rule()
    def finish(self) -> None:
        """Go on, and be left alone."""
        self.resume(None)

    @precondition(lambda self: self.world.folder.exists() and "move" not in self.tried)
    @rule()
    def move(self) -> None:
        """The folder is somewhere else from now on."""
        self.tried.add("move")
        self.do(Move())

    @precondition(lambda self: "ask" not in self.tried)
    @rule()
    def ask_for_what_cannot_be(self) -> None:
        """Beginning twice, resuming what is finished, measuring what is not."""
        self.tried.add("ask")
        self.do(AskForWhatCannotBe())

    @precondition(resumable)
    @rule(where=PLACES, which=st.integers(0, 2), how=HOW, mend=st.booleans())
    def spoil_the_newest(self, where: int, which: int, how: Any, mend: bool) -> None:
        """A checkpoint is damaged; then mended or removed."""
        self.do(SpoilCheckpoint(where=where, which=which, how=how, mend=mend))

    @precondition(resumable)
    @rule(key=st.sampled_from(sorted(OTHER_SETTINGS)))
    def resume_as_another(self, key: Any) -> None:
        """A setting that changes weights is changed."""
        self.do(ResumeAsAnother(key=key))

    @precondition(resumable)
    @rule(rhythm=st.integers(1, 4))
    def save_in_another_rhythm(self, rhythm: int) -> None:
        """How often is saved may change."""
        self.do(SaveInAnotherRhythm(rhythm=rhythm))

    @precondition(lambda self: self.finished() and "measure" not in self.tried)
    @rule()
    def measure(self) -> None:
        """A finished run is measured again."""
        self.tried.add("measure")
        self.do(Measure())

    @precondition(finished)
    @rule(where=PLACES, which=st.integers(0, 9), how=HOW)
    def spoil_what_was_saved(self, where: int, which: int, how: Any) -> None:
        """What was trained is damaged, and mended."""
        self.do(SpoilResult(where=where, which=which, how=how))


# Each rule is a process or two, and a short story can have several deaths.
TrainingLife.TestCase.settings = stories(1 / 4, steps=1 / 2)
test_training_life_ends_as_if_nothing_had_happened = TrainingLife.TestCase


PROFILE = settings.get_current_profile_name()
HURRIED = PROFILE.startswith("fast")
SUDDEN = ("kill", "power", "torn")
UNHURRIED_WAYS = {"slow": SUDDEN, "thorough": SUDDEN}
FEWEST = 200
"""How many processes the night's stories kill at least, each at a point of its own."""


def test_training_life_goes_on_after_a_death_at_every_change() -> None:
    """At whichever change to its folder a run dies, it goes on to the end it would have had.

    In a hurry only the last changes are tried, when a run says that it is finished; at night every way to die is tried
    at each change, and at least 200 processes have really died.
    """
    died: Counter[str] = Counter()
    for way in UNHURRIED_WAYS.get(PROFILE.partition("-")[0], ("power",)):
        changes = runner("reference").whole(training("plain").task).changes
        assert changes > 80
        for after in range(changes - 3 if HURRIED else 0, changes):
            story = TrainingLife()
            story.begin_in(training("plain"))
            story.do(Resume(death=Death(after, way)))
            died += story.world.died
            story.teardown()
    print("processes that died:", dict(died))
    if HURRIED:
        assert died == {"power": 3}
    else:
        assert died["power"] == changes
    if len(died) > 1:
        assert died["kill"] == changes
        assert died.total() >= FEWEST


class TorchLife(TrainingLife):
    """The same with torch."""

    subject: ClassVar = "torch"


class MlxLife(TrainingLife):
    """The same with MLX."""

    subject: ClassVar = "mlx"


def with_framework(machine: type[TrainingLife], *modules: str) -> Any:
    """The machine's test, of few stories: loading a saved adapter with a framework takes many seconds each time."""
    machine.TestCase.settings = stories(1 / 50)
    missing = [module for module in modules if find_spec(module) is None]
    hurried = pytest.mark.skipif(HURRIED, reason="takes a minute: HYPOTHESIS_PROFILE=ci has time for it")
    extra = pytest.mark.skipif(bool(missing), reason=f"needs the {machine.subject} extra: {', '.join(missing)} missing")
    return extra(hurried(machine.TestCase))


test_training_life_with_torch = with_framework(TorchLife, "torch", "transformers", "peft")
test_training_life_with_mlx = with_framework(MlxLife, "mlx", "mlx_lm")
