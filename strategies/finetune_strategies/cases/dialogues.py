"""Cases about what is said: conversations of several turns, words that templates stumble over, and their tokens."""

from collections.abc import Sequence
from typing import Annotated, Any

from hypothesis import strategies as st
from pydantic import Field

from finetune_strategies.cases.rows import TEXTS, Pair, Template
from finetune_strategies.recipes import Recipe

CONTROL = ("<|im_start|>", "<|im_end|>", "</s>", "<|pad|>")
_STUMBLES = ("{}", "{{ x }}", "{INPUT}", "%s", "<|im_end|>", "</s>", "<|im_start|>assistant", "[INST]", "### Response:")
WORDS = st.lists(TEXTS | st.sampled_from(_STUMBLES), min_size=1, max_size=3).map(" ".join)
"""What somebody says that looks like the markup of a template."""


class Dialogue(Recipe):
    """A conversation: what its system is told, if anything, and its turns."""

    system: str | None
    turns: Annotated[tuple[Pair, ...], Field(min_length=1, strict=False)]
    template: Template = "chatml"

    @property
    def messages(self) -> list[dict[str, str]]:
        """Its messages, the last of which is an answer."""
        found = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            found += [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.completion}]
        return found


def dialogues(words: st.SearchStrategy[str], *, least: int = 1, templates: Sequence[str] = ("chatml",)) -> Any:
    """Conversations of at least so many turns, and a template for each."""
    turns = st.lists(st.builds(Pair, prompt=words, completion=words), min_size=least, max_size=3).map(tuple)
    return st.builds(Dialogue, system=st.none() | words, turns=turns, template=st.sampled_from(tuple(templates)))
