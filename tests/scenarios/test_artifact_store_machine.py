"""A store of checkpoints, told as a story: saved into, rotated, killed, moved, damaged, and opened by other processes.

A dictionary says what must be there. What a process was about when it died is the only thing that may be either way.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finetune.verify.deaths import Death
from finetune.verify.subjects import Order
from finetune_strategies.profiles import examples
from scenarios.subjects import CODES, deaths, ours, spoil

pytestmark = pytest.mark.tier2
CHANGES = 32
"""As many as two orders of one process make to the store."""
PLACES = st.integers(0, 40) | st.integers(-90, -1) | st.integers(0, 700)
"""Where a file is damaged: what a manifest tells of itself stands at its beginning and at its end."""


class ArtifactStore(RuleBasedStateMachine):
    """One store in one folder, which several processes have one after the other."""

    @initialize(keep=st.integers(1, 3))
    def begin(self, keep: int) -> None:
        """Nothing is there yet."""
        self.subject, self.keep = ours("reference"), keep
        self.root = Path(tempfile.mkdtemp())
        self.folder = self.root / "checkpoints"
        self.there: dict[int, str] = {}
        self.best: dict[int, int | None] = {}
        self.damaged: set[int] = set()
        self.unreadable: set[int] = set()
        self.last = 0
        # What shows nothing new until something has happened.
        self.tried: set[str] = set()

    def teardown(self) -> None:
        """Leave nothing."""
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    def path(self, step: int) -> Path:
        """Where a checkpoint lies."""
        [found] = self.folder.glob(f"*{step:08d}")
        return found

    def protected(self, there: set[int], used: set[int]) -> set[int]:
        """What must stay: the newest, what was the best when each of them was written, and what is in use.

        Where one of the newest cannot say any more what the best was, everything must.
        """
        newest = set(sorted(there)[-self.keep :])
        if newest & self.unreadable:
            return there
        return there & {*newest, *(best for step in newest if (best := self.best[step]) is not None), *used}

    def draw_orders(self, data: st.DataObject) -> list[Order]:
        """A few orders for one process; steps grow, and the places where their number of digits does come early."""
        orders: list[Order] = []
        steps = [*self.there]
        for _ in range(data.draw(st.integers(1, 4), label="how many orders")):
            kinds = ["save", "save", *(["open"] if steps else []), "release"]
            kind = data.draw(st.sampled_from(kinds), label="order")
            if kind == "save":
                ahead = data.draw(st.sampled_from([1, 2, 9_000]), label="steps ahead")
                self.last = next(edge for edge in (9, 10, 99, 100, 9_900, self.last + ahead) if edge > self.last)
                best = data.draw(st.sampled_from([None, self.last, *steps]), label="best")
                orders.append(Order("save", self.last, f"what {self.last} holds", best))
                steps.append(self.last)
            else:
                orders.append(Order("open", data.draw(st.sampled_from(steps))) if kind == "open" else Order("release"))
        return orders

    @rule(data=st.data(), death=st.none() | deaths(CHANGES) | deaths(CHANGES))
    def work(self, data: st.DataObject, death: Death | None) -> None:
        """A process does as it is told, or dies before it has done it all."""
        self.tried.clear()
        self.carry_out(self.draw_orders(data), death)

    def carry_out(self, orders: list[Order], death: Death | None) -> bool:
        """Let a process do this, and take down what must be there; whether it died before it had done it all."""
        ending = self.subject.obey(self.folder, self.keep, orders, death)
        answers = [json.loads(line) for line in ending.answer.splitlines()]
        used: set[int] = set()
        for order, answer in zip(orders, answers, strict=False):
            self.follow(order, answer, used)
        cut_short = len(answers) < len(orders)
        if not cut_short:
            assert ending.code == 0, ending.told
            return False
        assert death is not None, ending.told
        codes = {CODES[death.by], -CODES["interrupt"]} if death.by != "interrupt" else {1, 130}
        assert ending.code in codes, ending.told
        if death.by == "full":
            assert "cannot write" in ending.told
        self.survive(orders[len(answers)], used)
        return True

    def follow(self, order: Order, answer: Any, used: set[int]) -> None:
        """What an order that was done has changed."""
        if order.do == "open":
            self.check_opened(order.step, answer)
            if isinstance(answer, str):
                used.add(order.step)
            return
        assert answer is None
        if order.do == "save":
            self.there[order.step], self.best[order.step] = order.content, order.best
        else:
            used.clear()
        self.keep_only(self.protected(set(self.there), used))

    def check_opened(self, step: int, answer: Any) -> None:
        """What is whole is opened; what is damaged or gone is refused by its name, with what to do."""
        if step in self.there and step not in self.damaged:
            assert answer == self.there[step]
        else:
            assert set(answer) == {"refused"}, "something damaged was opened"
            assert f"{step:08d}" in answer["refused"]
            assert "hint: " in answer["refused"]

    def survive(self, order: Order, used: set[int]) -> None:
        """Of an order that was not done something may have been: what must stay is there, and no more than was."""
        found = set(self.subject.listed(self.folder))
        before, after = set(self.there), set(self.there)
        if order.do == "save":
            self.best[order.step] = order.best
            after |= {order.step}
            if order.step in found:
                self.there[order.step] = order.content
        # Nothing goes before the new one is safe, and then only what need not stay.
        must = self.protected(after, used) if order.step in found or order.do == "release" else before
        assert must <= found <= after
        self.keep_only(found)

    def keep_only(self, steps: set[int]) -> None:
        """Forget what was removed."""
        self.there = {step: content for step, content in self.there.items() if step in steps}
        self.damaged &= steps
        self.unreadable &= steps

    @precondition(lambda self: self.folder.exists() and "move" not in self.tried)
    @rule()
    def move(self) -> None:
        """The folder is somewhere else from now on."""
        self.tried.add("move")
        self.folder = self.folder.rename(self.root / f"{self.folder.name}-moved")

    @precondition(lambda self: set(self.there) - self.damaged)
    @rule(data=st.data(), where=PLACES, which=st.sampled_from([0, 0, 1, 2]), how=st.sampled_from(["flip", "cut"]))
    def damage(self, data: st.DataObject, where: int, which: int, how: str) -> None:
        """A byte of one file changes, or its end is lost; often it is the newest manifest."""
        whole = sorted(set(self.there) - self.damaged)
        step = data.draw(st.just(whole[-1]) | st.sampled_from(whole))
        files = sorted(path for path in self.path(step).rglob("*") if path.is_file())
        file = files[which % len(files)]
        spoil(file, where, how)
        self.tried.clear()
        self.damaged.add(step)
        if file.parent == self.path(step) and file.suffix == ".json":
            self.unreadable.add(step)

    @precondition(lambda self: self.damaged)
    @rule(data=st.data())
    def remove_as_told(self, data: st.DataObject) -> None:
        """Do as the hint says: what was before it goes on."""
        step = data.draw(st.sampled_from(sorted(self.damaged)))
        shutil.rmtree(self.path(step))
        self.keep_only(set(self.there) - {step})

    @precondition(lambda self: self.there and "open" not in self.tried)
    @rule()
    def open_all_elsewhere(self) -> None:
        """A fresh process finds in each what was put there, and refuses what is damaged."""
        self.tried.add("open")
        steps = [*self.there, self.last + 1]
        ending = self.subject.obey(self.folder, self.keep, [Order("open", step) for step in steps])
        assert (ending.code, ending.changes) == (0, 0), ending.told
        for step, line in zip(steps, ending.answer.splitlines(), strict=True):
            self.check_opened(step, json.loads(line))

    @invariant()
    def agrees(self) -> None:
        """What is listed is what must be there, and exactly what is damaged is called so, by its name."""
        if not hasattr(self, "root"):
            return
        listed = self.subject.listed(self.folder)
        assert sorted(listed) == sorted(self.there)
        assert {step for step, wrong in listed.items() if wrong} == self.damaged
        assert all(f"{step:08d}" in listed[step] for step in self.damaged)


ArtifactStore.TestCase.settings = examples()
test_artifact_store_holds_what_it_must_through_everything = ArtifactStore.TestCase


@pytest.mark.parametrize("by", ["power", "torn"])
def test_artifact_store_survives_a_death_at_every_change(by: Literal["power", "torn"]) -> None:
    """P-CRASH: at whichever change a process dies that saves and rotates, what must be there is, and it goes on."""
    died = 0
    for after in range(CHANGES):
        story = ArtifactStore()
        story.begin(keep=1)
        story.carry_out([Order("save", 9, "a", 9), Order("save", 10, "b", 9), Order("save", 11, "c")], None)
        assert sorted(story.there) == [11]
        died += story.carry_out([Order("save", 12, "d", 11), Order("save", 13, "e", 13)], Death(after, by))
        story.agrees()
        story.carry_out([Order("save", 14, "f")], None)
        story.agrees()
        assert sorted(story.there) == [14]
        story.teardown()
    # Whoever writes nothing more does not notice that the disk is full.
    assert died > CHANGES / 2
