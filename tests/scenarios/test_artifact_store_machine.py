"""A store of checkpoints, told as a story: saved into, rotated, killed, moved, damaged, and opened by other processes.

What is done, and what must then be there, stands in `finetune.verify`, so that `ft replay` does and judges the same.
"""

from collections import Counter
from typing import Any, Literal

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from finetune.verify.stateful.deaths import Death
from finetune.verify.stateful.lives import Order
from finetune.verify.stateful.stages import DamageCheckpoint, Move, OpenAllElsewhere, RemoveAsTold, Work
from finetune.verify.stateful.story import StoreStory
from finetune_strategies.profiles import stories
from support.subjects import Storyteller, deaths

pytestmark = pytest.mark.tier2
CHANGES = 32
"""As many as two orders of one process make to the store."""
PLACES = st.integers(0, 40) | st.integers(-90, -1) | st.integers(0, 700)
"""Where a file is damaged: what a manifest tells of itself stands at its beginning and at its end."""


class ArtifactStore(Storyteller):
    """One store in one folder, which several processes have one after the other."""

    @initialize(keep=st.integers(1, 3))
    def begin(self, keep: int) -> None:
        """Nothing is there yet."""
        self.begin_in(StoreStory(keep=keep))
        # What shows nothing new until something has happened.
        self.tried: set[str] = set()

    def draw_orders(self, data: st.DataObject) -> list[Order]:
        """A few orders for one process; steps grow, and the places where their number of digits does come early."""
        orders: list[Order] = []
        steps, last = [*self.world.there], self.world.last
        for _ in range(data.draw(st.integers(1, 4), label="how many orders")):
            kinds = ["save", "save", *(["open"] if steps else []), "release"]
            kind = data.draw(st.sampled_from(kinds), label="order")
            if kind == "save":
                ahead = data.draw(st.sampled_from([1, 2, 9_000]), label="steps ahead")
                last = next(edge for edge in (9, 10, 99, 100, 9_900, last + ahead) if edge > last)
                best = data.draw(st.sampled_from([None, last, *steps]), label="best")
                orders.append(Order("save", last, f"what {last} holds", best))
                steps.append(last)
            else:
                orders.append(Order("open", data.draw(st.sampled_from(steps))) if kind == "open" else Order("release"))
        return orders

    @rule(data=st.data(), death=st.none() | deaths(CHANGES) | deaths(CHANGES))
    def work(self, data: st.DataObject, death: Death | None) -> None:
        """A process does as it is told, or dies before it has done it all."""
        self.tried.clear()
        self.do(Work(orders=tuple(self.draw_orders(data)), death=death))

    @precondition(lambda self: self.world.folder.exists() and "move" not in self.tried)
    @rule()
    def move(self) -> None:
        """The folder is somewhere else from now on."""
        self.tried.add("move")
        self.do(Move())

    @precondition(lambda self: self.world.whole)
    @rule(
        back=st.just(0) | st.integers(0, 9),
        where=PLACES,
        which=st.sampled_from([0, 0, 1, 2]),
        how=st.sampled_from(["flip", "cut"]),
    )
    def damage(self, back: int, where: int, which: int, how: Any) -> None:
        """A byte of one file changes, or its end is lost; often it is the newest manifest."""
        self.tried.clear()
        self.do(DamageCheckpoint(back=back, where=where, which=which, how=how))

    @precondition(lambda self: self.world.damaged)
    @rule(which=st.integers(0, 9))
    def remove_as_told(self, which: int) -> None:
        """Do as the hint says: what was before it goes on."""
        self.do(RemoveAsTold(which=which))

    @precondition(lambda self: self.world.there and "open" not in self.tried)
    @rule()
    def open_all_elsewhere(self) -> None:
        """A fresh process finds in each what was put there, and refuses what is damaged."""
        self.tried.add("open")
        self.do(OpenAllElsewhere())


ArtifactStore.TestCase.settings = stories()
test_artifact_store_holds_what_it_must_through_everything = ArtifactStore.TestCase


@pytest.mark.parametrize("by", ["power", "torn"])
def test_artifact_store_survives_a_death_at_every_change(by: Literal["power", "torn"]) -> None:
    """At whichever change a process dies that saves and rotates, what must be there is, and it goes on."""
    died: Counter[str] = Counter()
    saves = [("save", 9, "a", 9), ("save", 10, "b", 9), ("save", 11, "c")]
    for after in range(CHANGES):
        story = ArtifactStore()
        story.begin(keep=1)
        story.do(Work(orders=tuple(Order(*each) for each in saves)))
        assert sorted(story.world.there) == [11]
        orders = (Order("save", 12, "d", 11), Order("save", 13, "e", 13))
        story.do(Work(orders=orders, death=Death(after, by)))
        story.do(Work(orders=(Order("save", 14, "f"),)))
        assert sorted(story.world.there) == [14]
        died += story.world.died
        story.teardown()
    # Whoever writes nothing more does not notice that the disk is full.
    assert died[by] > CHANGES / 2
