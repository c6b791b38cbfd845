"""Laws of rows on their way to tokens: what is learned, what is not, and what is left out."""

from hypothesis import strategies as st

from finetune.verify.doors.answers import TokenRows
from finetune.verify.suite.cases import PLAIN, TINY, Rows, rows_of
from finetune.verify.suite.catalogue import law
from finetune.verify.suite.trainer import Trainer
from finetune.verify.suite.verdicts import hold


@law(
    "mask.answers",
    "What is trained on is each answer with what ends it, and nothing else.",
    needs=["tokenize"],
    oracle="the bytes of the answer: the model's tokenizer has one token for each",
    cases=st.builds(Rows, rows=rows_of(1, 3)),
)
def answers_are_trained(trainer: Trainer, case: Rows) -> None:
    """The trained tokens of each row, as text, begin with its answer; only what ends it follows."""
    model = trainer.model(TINY)
    found = trainer.ask("tokenize", TokenRows, model=model, settings=PLAIN, rows=case.values)
    names = trainer.words(model)
    for row in found.rows:
        said = b"".join(names[token] for token, target in zip(row.ids, row.targets, strict=True) if target)
        answer = case.rows[row.row].completion.encode()
        ends = [answer + ending for ending in (b"<|im_end|>", b"<|im_end|>\n")]
        hold(said in ends, expected=ends[0].decode(), got=said.decode(errors="replace"))
    hold(len(found.rows) == len(case.rows), expected=f"{len(case.rows)} rows", got=f"{len(found.rows)} rows")
