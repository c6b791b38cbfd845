"""A store of checkpoints, and a dictionary that says what must be there.

What a process was about when it died is the only thing that may be either way.
"""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.verify.check import check, check_same
from finetune.verify.stateful.deaths import CODES, Death
from finetune.verify.stateful.lives import LifeClient, Order
from finetune.verify.stateful.training import in_time, last_words


class StoreUnderTest:
    """One store in one folder, which several processes have one after the other."""

    def __init__(self, subject: LifeClient, keep: int, root: Path) -> None:
        self.subject = subject
        self.keep = keep
        self.root = root
        self.folder = root / "checkpoints"
        self.there: dict[int, str] = {}
        self.damaged: set[int] = set()
        self.unreadable: set[int] = set()
        self.last = 0
        self.died: Counter[str] = Counter()
        self._best: dict[int, int | None] = {}

    @property
    def whole(self) -> list[int]:
        """The steps of what is there and undamaged, in order."""
        return sorted(set(self.there) - self.damaged)

    @property
    def begun(self) -> bool:
        """Whether there is a folder."""
        return self.folder.exists()

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
        return there & {*newest, *(best for step in newest if (best := self._best[step]) is not None), *used}

    def carry_out(self, orders: Sequence[Order], death: Death | None) -> None:
        """Let a process do this, and take down what must be there."""
        self.last = max([self.last, *(order.step for order in orders if order.do == "save")])
        ending = in_time(self.subject.obey(self.folder, self.keep, orders, death))
        answers = [json.loads(line) for line in ending.answer.splitlines()]
        used: set[int] = set()
        for order, answer in zip(orders, answers, strict=False):
            self._follow(order, answer, used)
        words = last_words(ending)
        if len(answers) >= len(orders):
            check(ending.code == 0, expected=0, got=words, law="store.code")
            return
        check(death is not None, expected="every order done", got=words, law="store.code")
        assert death is not None
        codes = {CODES[death.by], -CODES["interrupt"]} if death.by != "interrupt" else {1, 130}
        check(ending.code in codes, expected=f"one of {sorted(codes)}", got=words, law="store.code")
        self.died[death.by] += 1
        if death.by == "full":
            check("cannot write" in ending.stderr, expected="cannot write", got=ending.stderr, law="store.full_disk")
        self._survive(orders[len(answers)], used)

    def _follow(self, order: Order, answer: Any, used: set[int]) -> None:
        """What an order that was done has changed."""
        if order.do == "open":
            self.check_opened(order.step, answer)
            if isinstance(answer, str):
                used.add(order.step)
            return
        check_same(None, answer, law="store.answers")
        if order.do == "save":
            self.there[order.step], self._best[order.step] = order.content, order.best
        else:
            used.clear()
        self.keep_only(self.protected(set(self.there), used))

    def check_opened(self, step: int, answer: object) -> None:
        """What is whole is opened; what is damaged or gone is refused by its name, with what to do."""
        if step in self.there and step not in self.damaged:
            check_same(self.there[step], answer, law="store.opens_whole")
            return
        words = answer.get("refused", "") if isinstance(answer, dict) else ""
        refused = f"{step:08d}" in words and "hint: " in words
        check(refused, expected=f"{step:08d} refused with a hint", got=answer, law="store.damaged")

    def _survive(self, order: Order, used: set[int]) -> None:
        """Of an order that was not done something may have been: what must stay is there, and no more than was."""
        found = set(self.subject.listed(self.folder))
        before, after = set(self.there), set(self.there)
        if order.do == "save":
            self._best[order.step] = order.best
            after |= {order.step}
            if order.step in found:
                self.there[order.step] = order.content
        # Nothing goes before the new one is safe, and then only what need not stay.
        must = self.protected(after, used) if order.step in found or order.do == "release" else before
        wanted = f"at least {sorted(must)}, at most {sorted(after)}"
        check(must <= found <= after, expected=wanted, got=sorted(found), law="store.torn")
        self.keep_only(found)

    def keep_only(self, steps: set[int]) -> None:
        """Forget what was removed."""
        self.there = {step: content for step, content in self.there.items() if step in steps}
        self.damaged &= steps
        self.unreadable &= steps

    def check(self) -> None:
        """What is listed is what must be there, and exactly what is damaged is called so, by its name."""
        listed = self.subject.listed(self.folder)
        check_same(sorted(self.there), sorted(listed), law="store.keeps")
        wrong = {step: words for step, words in listed.items() if words}
        check_same(sorted(self.damaged), sorted(wrong), law="store.damage_found")
        named = all(f"{step:08d}" in words for step, words in wrong.items())
        check(named, expected="each by its name", got=wrong, law="store.damage_found")

    def close(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self.root)
