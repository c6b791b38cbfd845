"""Laws of what fills up a batch, and of what a row says besides: neither is learned, and neither changes anything."""

from typing import Annotated

from hypothesis import strategies as st
from pydantic import Field

from finetune.verify.doors.answers import Epochs
from finetune.verify.suite.cases import PLAIN, TINY, Rows, rows_of
from finetune.verify.suite.catalogue import law
from finetune.verify.suite.trainer import Trainer
from finetune.verify.suite.verdicts import hold


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
    for batch in (micro for epoch in told.epochs for step in epoch for micro in step.micro):
        for ids, targets, real in zip(batch.ids, batch.targets, batch.real, strict=True):
            taught = [place for place, target in enumerate(targets) if target and not real[place]]
            hold(
                not taught,
                expected="no target beyond the row's last token",
                got=f"a row of {sum(real)} tokens in {len(ids)}, with targets at {taught}: ids {ids}",
            )


class Remarked(Rows):
    """Rows, one of which says something besides."""

    remarked: Annotated[int, Field(ge=0)]


@st.composite
def _remarked(draw: st.DrawFn) -> Remarked:
    rows = draw(rows_of(2, 3))
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
    hold(before == after, expected=before, got=after)
