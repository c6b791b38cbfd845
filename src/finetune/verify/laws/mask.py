"""Laws of what is learned: every answer, through any limit of length, and nothing else."""

import numpy as np

from finetune.chat.catalog import CHATML
from finetune.verify.catalogue import law, oracle
from finetune.verify.check import check
from finetune.verify.client import SubjectClient
from finetune.verify.laws.helpers import altered, check_loss, comparable, loss_of, text_of, tokenized, tokenized_row
from finetune.verify.laws.transcript import learned_text, said_of
from finetune.verify.subjects.answers import Gradient, Logits, Loss
from finetune_strategies.cases import mask as cases
from finetune_strategies.cases.dialogues import TOOLS, Rich
from finetune_strategies.cases.rows import PLAIN, TINY


@law("mask.answers", ["tokenize"], cases.MASK_ANSWERS)
@oracle("the bytes of the answers: the model's tokenizer has one token for each")
def answers_are_learned(trainer: SubjectClient, case: cases.Answered) -> None:
    """What is learned is every answer of a conversation, with what ends it, and nothing else."""
    model = trainer.model(TINY)
    rows = tokenized(trainer, model, case.values, {"tokens.max_length": 1000}).rows
    check(len(rows) == len(case.conversations), expected=f"{len(case.conversations)} rows", got=f"{len(rows)} rows")
    for row in rows:
        said = text_of(trainer.words(model), row, trained=True).replace(b"\n", b"")
        expected = "".join(f"{turn.completion}<|im_end|>" for turn in case.conversations[row.row].turns)
        check(said == expected.encode(), expected=expected, got=said.decode(errors="replace"))


@law("mask.weights", ["tokenize"], cases.MASK_WEIGHTS, examples=12)
@oracle("the bytes of the answers that their row does not except")
def answers_that_weigh_nothing_are_not_learned(trainer: SubjectClient, case: cases.Weighed) -> None:
    """An answer that its row says not to learn (`weight` 0, `train` false) is not, nor what ends it; the others are."""
    model = trainer.model(TINY)
    row = tokenized_row(trainer, model, {"messages": case.messages}, {"tokens.max_length": 1000})
    said = text_of(trainer.words(model), row, trained=True).replace(b"\n", b"")
    expected = "".join(f"{answer}<|im_end|>" for answer in case.learned)
    check(said == expected.encode(), expected=expected, got=said.decode(errors="replace"))


@law("mask.beside", ["tokenize"], cases.MASK_BESIDE, examples=8)
@oracle("what the model's template, rendered by jinja2, has behind each prompt")
def thoughts_and_calls_are_learned(trainer: SubjectClient, case: Rich) -> None:
    """Thoughts and calls are learned with the answer that they belong to; questions, results and tools are not."""
    model = trainer.model(TOOLS)
    row = tokenized_row(trainer, model, case.value, {"template.name": "tokenizer", "tokens.max_length": 1000})
    said = learned_text(trainer.words(model), row)
    expected = "".join(said_of(model, case.messages, case.given))
    check(said == expected, expected=expected, got=said)


@law("mask.template", ["tokenize"], cases.MASK_TEMPLATE, examples=5)
@oracle("the rows with the template of the same text that is built in")
def place_of_a_template_changes_nothing(trainer: SubjectClient, case: cases.Placed) -> None:
    """What a template teaches does not depend on where it comes from."""
    model, name = trainer.model(TINY), "tokenizer"
    if case.place == "file":
        file = trainer.folder() / "template.jinja"
        file.write_text(CHATML.jinja, encoding="utf-8")
        name = str(file)
    expected = comparable(tokenized(trainer, model, case.values, {"template.name": "chatml"}))
    found = comparable(tokenized(trainer, model, case.values, {"template.name": name}))
    check(found == expected, expected=expected, got=found)


@law("mask.fits", ["tokenize"], cases.MASK_FITS, examples=8)
@oracle("the rows with a limit far above them")
def limit_that_suffices_changes_nothing(trainer: SubjectClient, case: cases.Limited) -> None:
    """A limit of length that every row keeps changes nothing."""
    model = trainer.model(TINY)
    free = tokenized(trainer, model, case.values, {"tokens.max_length": 1000, "tokens.truncation": case.policy})
    most = max(len(row.ids) for row in free.rows)
    held = tokenized(trainer, model, case.values, {"tokens.max_length": most, "tokens.truncation": case.policy})
    check(comparable(held) == comparable(free), expected=comparable(free), got=comparable(held))


@law("mask.whole", ["tokenize"], cases.MASK_WHOLE, examples=10)
@oracle("the rows with a limit far above them")
def overlong_rows_are_left_out_whole(trainer: SubjectClient, case: cases.Limited) -> None:
    """A conversation that is longer than the limit is left out whole and counted; all others stay as they are."""
    model = trainer.model(TINY)
    free = tokenized(trainer, model, case.values, {"tokens.max_length": 1000})
    most = max(len(row.ids) for row in free.rows) - case.below
    held = tokenized(trainer, model, case.values, {"tokens.max_length": most, "tokens.truncation": case.policy})
    expected = [row for row in comparable(free) if len(row[1]) <= most]
    check(comparable(held) == expected, expected=f"up to {most} tokens: {expected}", got=comparable(held))
    gone, counted = len(free.rows) - len(expected), sum(held.dropped.values())
    check(counted == gone, expected=f"{gone} rows left out", got=held.dropped)


@law("mask.cut", ["tokenize"], cases.MASK_CUT, examples=10)
@oracle("the row that is not cut: its learned tokens, and as many of its prompt's bytes as are too many")
def cut_rows_keep_their_answers(trainer: SubjectClient, case: cases.Limited) -> None:
    """Where prompts may be cut, a row keeps its whole answer and what ends it, and is within the limit."""
    model = trainer.model(TINY)
    words = trainer.words(model)
    free = tokenized(trainer, model, case.values, {"tokens.max_length": 1000}).rows
    most = max(len(row.ids) for row in free) - case.below
    given = {"tokens.max_length": most, "tokens.truncation": "truncate_prompt"}
    held = {row.row: row for row in tokenized(trainer, model, case.values, given).rows}
    for row in free:
        check(row.row in held, expected=f"row {row.row}, cut", got=f"rows {sorted(held)}")
        cut, size = held[row.row], min(len(row.ids), most)
        sizes = (len(cut.ids), len(cut.targets))
        check(sizes == (size, size), expected=f"{size} tokens, each with a mark", got=f"tokens and marks: {sizes}")
        expected, said = (text_of(words, each, trained=True) for each in (row, cut))
        check(said == expected, expected=f"learned: {expected!r}", got=repr(said))


@law("mask.pieces", ["tokenize"], cases.MASK_PIECES, examples=8)
@oracle("the bytes of the text after its first")
def pieces_are_the_whole(trainer: SubjectClient, case: cases.Long) -> None:
    """A text that is cut into pieces is learned whole, each of its tokens once."""
    model = trainer.model(TINY)
    given = {"tokens.max_length": case.most, "tokens.truncation": "split"}
    rows = tokenized(trainer, model, [{"text": case.text}], given).rows
    words = trainer.words(model)
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


@law("mask.surprise", ["loss", "logits"], cases.MASK_MEASURED, examples=14, cost=2)
@oracle("the model's own logits, one row at a time")
def loss_is_the_mean_surprise(trainer: SubjectClient, case: cases.Batched) -> None:
    """The loss is the mean surprise at the learned tokens, each foretold from those before it; padding has no part."""
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
    check_loss(loss, total / learned)


@law("mask.measured", ["loss", "gradient"], cases.MASK_MEASURED, examples=8, cost=2)
@oracle("the loss that is reported of an optimizer step with the same batch, from the same weights, without dropout")
def measured_loss_is_the_trained_one(trainer: SubjectClient, case: cases.Batched) -> None:
    """The loss that is measured is the loss that is trained on."""
    batch = [row.value for row in case.rows]
    step = trainer.ask("gradient", Gradient, model=trainer.model(TINY), settings=PLAIN, micro=[batch])
    check_loss(loss_of(trainer, case.rows)[0], step.loss)


@law("mask.limits", ["tokenize"], cases.MASK_LIMITS, examples=3)
@oracle("the length of the two texts: the model's tokenizer has one token for each byte, and one ends a text")
def limit_is_kept_at_any_size(trainer: SubjectClient, case: cases.Sized) -> None:
    """A limit of 8 tokens and one of tens of thousands are kept alike: what reaches it stays, a token more does not."""
    model = altered(trainer, trainer.model(TINY), {"max_position_embeddings": 65_536})
    rows = [{"text": "a" * size} for size in (1, case.most - 1, case.most)]
    found = tokenized(trainer, model, rows, {"tokens.max_length": case.most, "tokens.truncation": "drop"})
    sizes = [(row.row, len(row.ids)) for row in found.rows]
    wanted = [(0, 2), (1, case.most)]
    check(sizes == wanted, expected=f"rows and tokens: {wanted}", got=f"rows and tokens: {sizes}")
    check(sum(found.dropped.values()) == 1, expected="1 row left out", got=found.dropped)


@law("mask.none", ["loss", "gradient"], cases.MASK_NONE, examples=6, cost=2)
@oracle("the same batch without the row")
def row_without_targets_has_no_part(trainer: SubjectClient, case: cases.Untaught) -> None:
    """A row of which nothing is to be learned changes neither the loss of its batch nor a step's gradient."""
    given = {"model": trainer.model(TINY), "settings": PLAIN}
    alone, beside = [case.row.value], case.values
    wanted, found = (trainer.ask("loss", Loss, batch=batch, **given) for batch in (alone, beside))
    check_loss(found.loss, wanted.loss)
    check(found.count == wanted.count, expected=f"{wanted.count} tokens are learned", got=found.count)
    first, other = (trainer.ask("gradient", Gradient, micro=[batch], **given) for batch in (alone, beside))
    check_loss(other.loss, first.loss)
    largest = max(first.norms.values())
    for name, norm in first.norms.items():
        near = abs(other.norms.get(name, np.inf) - norm) <= 2e-3 * norm + 1e-5 * largest
        check(near, expected=f"{name}: {norm:.6g}", got=f"{name}: {other.norms.get(name)}")
