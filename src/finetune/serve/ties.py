"""Tells whether a served answer leaves the trainer's only where two words are as good as equal."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from finetune.evidence.drift import Bound
from finetune.export.gguf import plan_whole
from finetune.export.gguf_check import bound_of
from finetune.export.gguf_source import Exportable
from finetune.export.outtypes import Outtype
from finetune.export.vocabulary import describe_vocabulary
from finetune.ports import Session


@dataclass(frozen=True)
class Ties:
    """The trainer in float32, which is opened only once an answer differs.

    Attributes:
        exportable: what was trained.
        outtype: the type of the file that is served: its rounding says how far logits may be off.
        prompts: those of the questions, as ids.
        stops: the ids at which an answer ends.
        most: how many tokens an answer may have.
    """

    exportable: Exportable
    outtype: Outtype
    prompts: Sequence[tuple[int, ...]]
    stops: tuple[int, ...]
    most: int

    def explain(self, prompt: tuple[int, ...], text: str) -> bool:
        """Whether the trainer could as well have said this text: its own, or another from a tie on.

        A tie is where another word lies within twice what a logit may be off: each of two may be off by that.
        """
        own = self._answer(prompt)
        whole, text = self._decode(own), _whole(text)
        if text == whole:
            return True
        for place, row in enumerate(self._rows(prompt, own)):
            shared = self._decode(own[:place])
            if not text.startswith(shared):
                return False
            near = (row >= row.max() - 2 * self.bound.distance * row.std()).nonzero()[0]
            others = [int(each) for each in near if place >= len(own) or each != own[place]]
            if any(self._begins(text, own[:place], each) for each in others):
                return True
        return False

    def says(self, prompt: tuple[int, ...]) -> str:
        """The trainer's own answer."""
        return self._decode(self._answer(prompt))

    @cached_property
    def session(self) -> Session:
        """The trainer."""
        return self.exportable.open()

    @cached_property
    def bound(self) -> Bound:
        """How far the log probabilities of such a file may be off, in spreads of the logits."""
        sequences = [(*prompt, *self._answer(prompt)) for prompt in self.prompts[:8]]
        bounds = self.exportable.bounds(self.session, sequences)
        from_table = self.exportable.described.family.activation_from_table
        return bound_of(bounds, plan_whole(self.exportable, self.outtype), self.outtype, from_table=from_table)

    def _begins(self, text: str, before: Sequence[int], other: int) -> bool:
        if other in self.stops:
            return text == self._decode(before)
        return text.startswith(self._decode([*before, other]))

    def _answer(self, prompt: tuple[int, ...]) -> list[int]:
        return self.session.generate([prompt], self.most, self.stops)[0]

    def _decode(self, ids: Sequence[int]) -> str:
        return _whole(self.exportable.tokenizer.decode([number for number in ids if number not in self.hidden]))

    @cached_property
    def hidden(self) -> frozenset[int]:
        """The ids that llama.cpp shows no text of; Gemma's `<unused9>` is one for its name alone."""
        made_of = self.exportable
        return describe_vocabulary(made_of.tokenizer.description(), made_of.special, made_of.rows).control

    def _rows(self, prompt: tuple[int, ...], own: Sequence[int]) -> NDArray[Any]:
        """The logits of each token of an answer, and of the one after it."""
        from safetensors.numpy import load_file

        with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
            path = Path(folder) / "logits.safetensors"
            self.session.save_logits([[*prompt, *own]], path)
            rows: NDArray[Any] = load_file(path)["0"][len(prompt) - 1 :][: self.most]
        return rows


def _whole(text: str) -> str:
    """A text without its last character where that is in parts, which tell nothing yet."""
    return text.rstrip("\ufffd").strip()
