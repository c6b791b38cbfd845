"""Cases about what is said: conversations of several turns, words that templates stumble over, and their tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from hypothesis import strategies as st
from pydantic import Field

from finetune.verify.doors.answers import TokenRow, TokenRows
from finetune.verify.recipes import Recipe
from finetune.verify.suite.cases import PLAIN, TEXTS, Pair, Template
from finetune.verify.suite.trainer import Trainer
from finetune.verify.suite.verdicts import check

CONTROL = ("<|im_start|>", "<|im_end|>", "</s>", "<|pad|>")
_STUMBLES = ("{}", "{{ x }}", "{INPUT}", "%s", "<|im_end|>", "</s>", "<|im_start|>assistant", "[INST]", "### Response:")
WORDS = st.lists(TEXTS | st.sampled_from(_STUMBLES), min_size=1, max_size=3).map(" ".join)
"""What somebody says that looks like the markup of a template."""


class ConversationCase(Recipe):
    """A conversation: what its system is told, if anything, and its turns."""

    system: str | None
    turns: Annotated[tuple[Pair, ...], Field(min_length=1, strict=False)]
    template: Template = "chatml"

    @property
    def messages(self) -> list[dict[str, str]]:
        """Its messages, the last of which is an answer."""
        told = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            told += [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.completion}]
        return told


def conversation_cases(words: st.SearchStrategy[str], *, least: int = 1, templates: Sequence[str] = ("chatml",)) -> Any:
    """Conversations of at least so many turns, and a template for each."""
    turns = st.lists(st.builds(Pair, prompt=words, completion=words), min_size=least, max_size=3).map(tuple)
    return st.builds(
        ConversationCase, system=st.none() | words, turns=turns, template=st.sampled_from(tuple(templates))
    )


def tokenized(
    trainer: Trainer, model: Path, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> TokenRows:
    """Rows as they are trained on, with these settings on top of plain ones; each token of theirs has a mark."""
    found = trainer.ask("tokenize", TokenRows, model=model, settings={**PLAIN, **settings}, rows=list(rows))
    for row in found.rows:
        size, marks = len(row.ids), len(row.targets)
        check(size == marks, expected=f"{size} tokens with {size} marks", got=f"{size} tokens with {marks} marks")
    return found


def tokenized_row(trainer: Trainer, model: Path, row: Mapping[str, Any], settings: Mapping[str, Any]) -> TokenRow:
    """A row as it is trained on, which is one row."""
    rows = tokenized(trainer, model, [row], settings).rows
    check(len(rows) == 1, expected="1 row", got=f"{len(rows)} rows")
    return rows[0]


def text_of(words: Mapping[int, bytes], row: TokenRow, *, trained: bool = False) -> bytes:
    """The bytes of a row's tokens, control tokens by name; with `trained` only of those that are learned."""
    said = zip(row.ids, row.targets, strict=True)
    return b"".join(words.get(token, b"?") for token, target in said if target or not trained)


def comparable_rows(rows: TokenRows) -> list[tuple[int, list[int], list[bool]]]:
    """The rows as values that can be compared."""
    return [(row.row, row.ids, row.targets) for row in rows.rows]
