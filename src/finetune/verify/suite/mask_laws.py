"""Laws of what is learned: every answer, through any limit of length, each token from the one before it."""

from typing import Annotated, Literal

import numpy as np
from hypothesis import strategies as st
from pydantic import Field

from finetune.chat.catalog import CHATML
from finetune.verify.doors.answers import Gradient, Logits, Loss
from finetune.verify.recipes import FEWEST_WORDS, Recipe
from finetune.verify.suite.cases import PLAIN, TEXTS, TINY, Pair, Rows, TokenRowCase, rows_of
from finetune.verify.suite.catalogue import law
from finetune.verify.suite.talks import (
    ConversationCase,
    comparable_rows,
    conversation_cases,
    text_of,
    tokenized,
    tokenized_row,
)
from finetune.verify.suite.trainer import Trainer
from finetune.verify.suite.verdicts import check

_NEAR = 2e-3
"""How far a loss may be off, relatively: float32 sums of a few dozen terms are within a tenth of it."""


@law(
    "mask.turns",
    "Every answer of a conversation is learned, with what ends it, and nothing else.",
    needs=["tokenize"],
    oracle="the bytes of the answers: the model's tokenizer has one token for each",
    cases=conversation_cases(TEXTS, least=2),
    examples=10,
)
def every_answer_is_learned(trainer: Trainer, case: ConversationCase) -> None:
    """The learned tokens as text are the answers, each ended."""
    model = trainer.model(TINY)
    row = tokenized_row(trainer, model, {"messages": case.messages}, {"tokens.max_length": 1000})
    said = text_of(trainer.token_bytes(model), row, trained=True).replace(b"\n", b"")
    expected = "".join(f"{turn.completion}<|im_end|>" for turn in case.turns)
    check(said == expected.encode(), expected=expected, got=said.decode(errors="replace"))


class Placed(Rows):
    """Rows, and where their template comes from."""

    place: Literal["tokenizer", "file"]


@law(
    "mask.template",
    "What a template teaches does not depend on where it comes from.",
    needs=["tokenize"],
    oracle="the rows with the template of the same text that is built in",
    cases=st.builds(Placed, rows=rows_of(1, 2), place=st.sampled_from(("tokenizer", "file"))),
    examples=5,
)
def place_of_a_template_changes_nothing(trainer: Trainer, case: Placed) -> None:
    """ChatML as the tokenizer's own, and in a file."""
    model, name = trainer.model(TINY), "tokenizer"
    if case.place == "file":
        file = trainer.folder() / "template.jinja"
        file.write_text(CHATML.jinja, encoding="utf-8")
        name = str(file)
    expected = comparable_rows(tokenized(trainer, model, case.values, {"template.name": "chatml"}))
    found = comparable_rows(tokenized(trainer, model, case.values, {"template.name": name}))
    check(found == expected, expected=expected, got=found)


Policy = Literal["drop", "truncate_prompt", "split"]


class Limited(Rows):
    """Rows, a policy for those that are too long, and how far below the longest row the limit is."""

    policy: Policy
    below: Annotated[int, Field(ge=0)]


_LONGER = st.builds(Pair, prompt=TEXTS.map(lambda text: f"longer than that: {text}"), completion=TEXTS)
_SHORT = Pair(prompt="a", completion="b")


def _limited(below: st.SearchStrategy[int], *policies: Policy) -> st.SearchStrategy[Limited]:
    rows = st.lists(_LONGER, min_size=1, max_size=2).map(lambda rows: (_SHORT, *rows))
    return st.builds(Limited, rows=rows, policy=st.sampled_from(policies), below=below)


@law(
    "mask.fits",
    "A limit of length that every row keeps changes nothing.",
    needs=["tokenize"],
    oracle="the rows with a limit far above them",
    cases=_limited(st.just(0), "drop", "truncate_prompt", "split"),
    examples=8,
)
def limit_that_suffices_changes_nothing(trainer: Trainer, case: Limited) -> None:
    """The limit is the length of the longest row."""
    model = trainer.model(TINY)
    free = tokenized(trainer, model, case.values, {"tokens.max_length": 1000, "tokens.overlong": case.policy})
    most = max(len(row.ids) for row in free.rows)
    held = tokenized(trainer, model, case.values, {"tokens.max_length": most, "tokens.overlong": case.policy})
    check(comparable_rows(held) == comparable_rows(free), expected=comparable_rows(free), got=comparable_rows(held))


@law(
    "mask.whole",
    "A conversation that is longer than the limit is left out whole and counted; all others stay as they are.",
    needs=["tokenize"],
    oracle="the rows with a limit far above them",
    cases=_limited(st.integers(1, 9), "drop", "split"),
    examples=10,
)
def overlong_rows_are_left_out_whole(trainer: Trainer, case: Limited) -> None:
    """Neither cut nor in pieces."""
    model = trainer.model(TINY)
    free = tokenized(trainer, model, case.values, {"tokens.max_length": 1000})
    most = max(len(row.ids) for row in free.rows) - case.below
    held = tokenized(trainer, model, case.values, {"tokens.max_length": most, "tokens.overlong": case.policy})
    expected = [row for row in comparable_rows(free) if len(row[1]) <= most]
    check(comparable_rows(held) == expected, expected=f"up to {most} tokens: {expected}", got=comparable_rows(held))
    gone, counted = len(free.rows) - len(expected), sum(held.dropped.values())
    check(counted == gone, expected=f"{gone} rows left out", got=held.dropped)


@law(
    "mask.cut",
    "Where prompts may be cut, a row keeps its whole answer and what ends it, and is within the limit.",
    needs=["tokenize"],
    oracle="the row that is not cut: its learned tokens, and as many of its prompt's bytes as are too many",
    cases=_limited(st.integers(1, 12), "truncate_prompt"),
    examples=10,
)
def cut_rows_keep_their_answers(trainer: Trainer, case: Limited) -> None:
    """Only words of the prompt go."""
    model = trainer.model(TINY)
    words = trainer.token_bytes(model)
    free = tokenized(trainer, model, case.values, {"tokens.max_length": 1000}).rows
    most = max(len(row.ids) for row in free) - case.below
    given = {"tokens.max_length": most, "tokens.overlong": "truncate_prompt"}
    held = {row.row: row for row in tokenized(trainer, model, case.values, given).rows}
    for row in free:
        check(row.row in held, expected=f"row {row.row}, cut", got=f"rows {sorted(held)}")
        cut, size = held[row.row], min(len(row.ids), most)
        sizes = (len(cut.ids), len(cut.targets))
        check(sizes == (size, size), expected=f"{size} tokens, each with a mark", got=f"tokens and marks: {sizes}")
        expected, said = (text_of(words, each, trained=True) for each in (row, cut))
        check(said == expected, expected=f"learned: {expected!r}", got=repr(said))


class Long(Recipe):
    """A text, and a limit."""

    text: str
    most: Annotated[int, Field(ge=8)]


@law(
    "mask.pieces",
    "A text that is cut into pieces is learned whole, each of its tokens once.",
    needs=["tokenize"],
    oracle="the bytes of the text after its first",
    cases=st.builds(Long, text=TEXTS.map(lambda text: f"{text} and so on, and on, and on"), most=st.integers(8, 17)),
    examples=8,
)
def pieces_are_the_whole(trainer: Trainer, case: Long) -> None:
    """The learned tokens of all pieces, one after the other."""
    model = trainer.model(TINY)
    given = {"tokens.max_length": case.most, "tokens.overlong": "split"}
    rows = tokenized(trainer, model, [{"text": case.text}], given).rows
    words = trainer.token_bytes(model)
    longest = max(len(row.ids) for row in rows)
    check(longest <= case.most, expected=f"pieces of {case.most} tokens at most", got=f"one of {longest}")
    said = b"".join(
        words.get(token, b"?")
        for row in rows
        for token, target in zip(row.ids[1:], row.targets[1:], strict=True)
        if target
    )
    expected = case.text.encode()[1:] + b"</s>"
    check(said == expected, expected=repr(expected), got=repr(said))


class Batched(Recipe):
    """Rows of one batch."""

    rows: Annotated[tuple[TokenRowCase, ...], Field(min_length=1, max_length=3, strict=False)]


@st.composite
def _any_rows(draw: st.DrawFn) -> Batched:
    """Rows of any tokens, those for padding and for ends among them."""
    tokens = st.one_of(st.integers(0, 3), st.integers(0, FEWEST_WORDS - 1))
    ids = st.lists(tokens, min_size=2, max_size=12)
    drawn = draw(st.lists(ids, min_size=1, max_size=3))
    rows = [TokenRowCase(ids=tuple(each), answer=draw(st.integers(1, len(each) - 1))) for each in drawn]
    return Batched(rows=tuple(rows))


def hold_loss(loss: float, expected: float) -> None:
    """The loss is this one, rounding aside."""
    near = abs(loss - expected) <= _NEAR * max(1.0, abs(expected))
    check(near, expected=f"loss {expected:.5f}", got=f"loss {loss:.5f}")


def loss_of(trainer: Trainer, rows: tuple[TokenRowCase, ...]) -> tuple[float, int]:
    """The loss of a batch, and over how many tokens it is."""
    batch = [row.value for row in rows]
    found = trainer.ask("loss", Loss, model=trainer.model(TINY), settings=PLAIN, batch=batch)
    learned = sum(row.answer for row in rows)
    check(found.count in (None, learned), expected=f"{learned} tokens are learned", got=found.count)
    return found.loss, learned


@law(
    "mask.surprise",
    "The loss is the mean surprise at the learned tokens, each foretold from those before it; padding has no part.",
    needs=["loss", "logits"],
    oracle="the model's own logits, one row at a time",
    cases=_any_rows(),
    examples=14,
    cost=2,
)
def loss_is_the_mean_surprise(trainer: Trainer, case: Batched) -> None:
    """Whatever the tokens' ids are, the padding's among them."""
    model = trainer.model(TINY)
    prompts = [list(row.ids) for row in case.rows]
    logits = trainer.tensors(trainer.ask("logits", Logits, model=model, settings=PLAIN, prompts=prompts).file)
    total = 0.0
    for number, row in enumerate(case.rows):
        scores = logits[str(number)].astype(np.float64)
        chances = scores - np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1, keepdims=True))
        chances -= scores.max(-1, keepdims=True)
        total -= sum(chances[place - 1, row.ids[place]] for place in range(len(row.ids) - row.answer, len(row.ids)))
    loss, learned = loss_of(trainer, case.rows)
    hold_loss(loss, total / learned)


@law(
    "mask.measured",
    "The loss that is measured is the loss that is trained on.",
    needs=["loss", "gradient"],
    oracle="the loss that is told of an optimizer step with the same batch, from the same weights, without dropout",
    cases=_any_rows(),
    examples=8,
    cost=2,
)
def measured_loss_is_the_trained_one(trainer: Trainer, case: Batched) -> None:
    """A fresh adapter adds nothing: the base's loss is that of the first step."""
    batch = [row.value for row in case.rows]
    step = trainer.ask("gradient", Gradient, model=trainer.model(TINY), settings=PLAIN, micro=[batch])
    hold_loss(loss_of(trainer, case.rows)[0], step.loss)
