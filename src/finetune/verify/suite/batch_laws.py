"""Laws of batches: every row is learned from, once an epoch, and how rows are dealt out changes nothing."""

from typing import Annotated

from hypothesis import strategies as st
from pydantic import Field

from finetune.verify.doors.answers import Epochs, Gradient, TokenRows
from finetune.verify.recipes import Recipe
from finetune.verify.suite.cases import PLAIN, TINY, Rows, TokenRowCase, rows_of, token_rows
from finetune.verify.suite.catalogue import law
from finetune.verify.suite.trainer import Trainer
from finetune.verify.suite.verdicts import check


class Dealt(Rows):
    """Rows, and how they are dealt out."""

    batch_size: Annotated[int, Field(ge=1, le=8)]
    accumulation: Annotated[int, Field(ge=1, le=4)]
    seed: Annotated[int, Field(ge=0)]


@st.composite
def _dealt(draw: st.DrawFn) -> Dealt:
    """Whole batches and what is left over, so that a smaller batch size makes fewer rows."""
    size = draw(st.integers(1, 4))
    count = max(1, size * draw(st.integers(0, 2)) + draw(st.integers(0, size - 1)))
    rows = draw(rows_of(count, count))
    return Dealt(rows=rows, batch_size=size, accumulation=draw(st.integers(1, 3)), seed=draw(st.integers(0, 3)))


@law(
    "batches.cover",
    "Every epoch trains on every row exactly once, whatever the sizes of batches.",
    needs=["tokenize", "batches"],
    oracle="the rows themselves, as the trainer's own tokenizing gives them",
    cases=_dealt(),
)
def every_row_is_trained_on(trainer: Trainer, case: Dealt) -> None:
    """The sequences of each epoch are the rows, as often as each is there."""
    settings = {
        **PLAIN,
        "training.batch_size": case.batch_size,
        "training.accumulation": case.accumulation,
        "training.seed": case.seed,
    }
    model = trainer.model(TINY)
    rows = trainer.ask("tokenize", TokenRows, model=model, settings=settings, rows=case.values).rows
    dealt = trainer.ask("batches", Epochs, model=model, settings=settings, rows=case.values, epochs=2)
    check(len(dealt.epochs) == 2, expected="2 epochs", got=f"{len(dealt.epochs)} epochs")
    expected = sorted(row.ids for row in rows)
    for number, epoch in enumerate(dealt.epochs, start=1):
        micro = [batch for step in epoch for batch in step.micro]
        found = sorted(
            [token for token, real in zip(ids, marks, strict=True) if real]
            for batch in micro
            for ids, marks in zip(batch.ids, batch.real, strict=True)
        )
        check(
            found == expected,
            expected=f"{len(expected)} rows in epoch {number}",
            got=f"{len(found)} rows: {found}",
        )


class Windows(Recipe):
    """Rows of one optimizer step, and after how many of them a new micro-batch begins."""

    rows: Annotated[tuple[TokenRowCase, ...], Field(min_length=2, max_length=6, strict=False)]
    first: Annotated[int, Field(ge=1)]


@st.composite
def _windows(draw: st.DrawFn) -> Windows:
    rows = draw(st.lists(token_rows(), min_size=2, max_size=4))
    return Windows(rows=tuple(rows), first=draw(st.integers(1, len(rows) - 1)))


@law(
    "accumulation.same",
    "A step's gradient and loss are those of all its tokens together, however they are split into micro-batches.",
    needs=["gradient"],
    oracle="the same rows in one batch",
    cases=_windows(),
    cost=3,
    examples=12,
)
def accumulation_changes_nothing(trainer: Trainer, case: Windows) -> None:
    """One batch of all rows, and two batches of them, have the same gradient."""
    model = trainer.model(TINY)
    rows = [row.value for row in case.rows]
    given = {"model": model, "settings": PLAIN}
    whole = trainer.ask("gradient", Gradient, micro=[rows], **given)
    split = trainer.ask("gradient", Gradient, micro=[rows[: case.first], rows[case.first :]], **given)
    for name, norm in whole.norms.items():
        near = abs(split.norms.get(name, -1.0) - norm) <= 1e-3 * norm + 1e-6
        check(near, expected=f"{name}: {norm:.6g}", got=f"{name}: {split.norms.get(name)}")
    check(abs(split.loss - whole.loss) <= 1e-3, expected=f"loss {whole.loss:.6f}", got=f"loss {split.loss:.6f}")
