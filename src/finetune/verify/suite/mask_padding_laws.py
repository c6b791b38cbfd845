"""Laws of what fills up a batch, and of what a row says besides: neither is learned, and neither changes anything."""

from typing import Annotated

from hypothesis import strategies as st
from pydantic import Field

from finetune.verify.doors.answers import Epochs, Loss
from finetune.verify.recipes import Recipe
from finetune.verify.suite.cases import PLAIN, TINY, Pair, Rows, TokenRowCase, rows_of, token_rows
from finetune.verify.suite.catalogue import law
from finetune.verify.suite.trainer import Trainer
from finetune.verify.suite.verdicts import check


@law(
    "padding.no_target",
    "What fills a batch up to its longest row is never what the model is taught to say.",
    needs=["batches"],
    oracle="the trainer's own marks of what is of a row",
    cases=st.builds(Rows, rows=rows_of(1, 3)),
    examples=8,
)
def padding_is_no_target(trainer: Trainer, case: Rows) -> None:
    """No target stands where nothing is real."""
    settings = {**PLAIN, "training.batch_size": len(case.rows), "training.accumulation": 1}
    told = trainer.ask("batches", Epochs, model=trainer.model(TINY), settings=settings, rows=case.values, epochs=1)
    check(len(told.epochs) == 1, expected="1 epoch", got=f"{len(told.epochs)} epochs")
    for batch in (micro for epoch in told.epochs for step in epoch for micro in step.micro):
        for ids, targets, real in zip(batch.ids, batch.targets, batch.real, strict=True):
            taught = [place for place, target in enumerate(targets) if target and not real[place]]
            check(
                not taught,
                expected="no target beyond the row's last token",
                got=f"a row of {sum(real)} tokens in {len(ids)}, with targets at {taught}: ids {ids}",
            )


class Together(Recipe):
    """Two rows of ids that share a batch."""

    rows: Annotated[tuple[TokenRowCase, ...], Field(min_length=2, max_length=2, strict=False)]


@law(
    "padding.same_loss",
    "The loss of rows that share a batch is that of their tokens, whatever the batch is filled up with.",
    needs=["loss"],
    oracle="the loss of each row alone by our trainer in float64, where nothing is filled up, weighted by its tokens",
    cases=st.builds(Together, rows=st.lists(token_rows(most=14), min_size=2, max_size=2).map(tuple)),
    cost=2,
    examples=8,
)
def padding_changes_no_loss(trainer: Trainer, case: Together) -> None:
    """One batch of both is the mean of each alone, a token counting as much as any other."""
    model, settings = trainer.model(TINY), {**PLAIN, "training.batch_size": 2}
    got = trainer.ask("loss", Loss, model=model, settings=settings, batch=[row.value for row in case.rows]).loss
    alone = [
        trainer.oracle.ask("loss", Loss, model=model, settings=settings, batch=[row.value]).loss for row in case.rows
    ]
    counts = [row.answer for row in case.rows]
    expected = sum(count * loss for count, loss in zip(counts, alone, strict=True)) / sum(counts)
    check(abs(got - expected) <= 1e-3, expected=f"{expected:.5f}", got=f"{got:.5f}")


class Remarked(Rows):
    """Rows, one of which says something besides."""

    remarked: Annotated[int, Field(ge=0)]


@st.composite
def _remarked(draw: st.DrawFn) -> Remarked:
    # All of one length, so that nothing but their order says which share a batch.
    letters = draw(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=6, unique=True))
    rows = tuple(Pair(prompt="q", completion=letter) for letter in letters)
    return Remarked(rows=rows, remarked=draw(st.integers(0, len(rows) - 1)))


@law(
    "rows.remarks",
    "A key of a row that is not read changes no batch.",
    needs=["batches"],
    oracle="the batches of the same rows without it",
    cases=_remarked(),
    examples=8,
)
def remarks_change_no_batch(trainer: Trainer, case: Remarked) -> None:
    """Rows share batches as they did before one of them had a source noted; which stands first does not matter."""
    settings = {**PLAIN, "training.batch_size": 2, "training.accumulation": 1, "training.seed": 3}
    noted = [{**row, "source": "a note"} if place == case.remarked else row for place, row in enumerate(case.values)]
    model = trainer.model(TINY)
    plain, other = (
        trainer.ask("batches", Epochs, model=model, settings=settings, rows=rows, epochs=1)
        for rows in (case.values, noted)
    )
    before, after = ([sorted(step.micro[0].ids) for step in told.epochs[0]] for told in (plain, other))
    check(before == after, expected=before, got=after)
