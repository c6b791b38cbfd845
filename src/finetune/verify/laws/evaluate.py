"""Laws of looking at a model: losses and answers do not depend on how they are asked for."""

import json

import numpy as np

from finetune.verify.catalogue import law, oracle
from finetune.verify.check import check
from finetune.verify.client import SubjectClient
from finetune.verify.laws.helpers import altered, tokenized
from finetune.verify.models import build_model
from finetune.verify.subjects.answers import Generated, Logits, Loss, MeasuredTwice, TokenRows
from finetune_strategies.cases import evaluate as cases
from finetune_strategies.cases.rows import PLAIN, TINY
from finetune_strategies.recipes import CONTROL_TOKENS


def _look(trainer: SubjectClient, case: cases.Looked, rows: list[dict[str, str]], size: int) -> Loss:
    settings = {**PLAIN, "training.batch_size": size}
    return trainer.ask("evaluate", Loss, model=trainer.model(case.model), settings=settings, rows=rows)


def _near(found: Loss, wanted: float) -> bool:
    return abs(found.loss - wanted) <= 1e-3 * (1 + wanted)


@law("evaluate.oracle", ["evaluate", "tokenize"], cases.LOOKED, examples=8, cost=2)
@oracle("the rows' own tokens in float64, all at once")
def held_out_loss_is_of_all_tokens(trainer: SubjectClient, case: cases.Looked) -> None:
    """The held-out loss is the mean surprise of all held-out tokens, however many rows are looked at at once."""
    given = {"model": trainer.model(case.model), "settings": PLAIN}
    rows = [
        {"ids": row.ids, "targets": row.targets}
        for row in trainer.ask("tokenize", TokenRows, rows=case.values, **given).rows
    ]
    wanted = trainer.oracle.ask("loss", Loss, batch=rows, **given)
    found = _look(trainer, case, case.values, case.batch_size)
    check(_near(found, wanted.loss), expected=f"loss {wanted.loss:.6f}", got=f"loss {found.loss:.6f}")
    check(found.count in (None, wanted.count), expected=f"{wanted.count} tokens", got=f"{found.count} tokens")


@law("evaluate.order", ["evaluate"], cases.LOOKED, examples=4, cost=2)
@oracle("the same rows the other way round")
def order_does_not_matter(trainer: SubjectClient, case: cases.Looked) -> None:
    """The held-out loss does not depend on the order of the rows."""
    here = _look(trainer, case, case.values, case.batch_size)
    there = _look(trainer, case, case.values[::-1], case.batch_size)
    check(_near(here, there.loss), expected=f"loss {there.loss:.6f}", got=f"loss {here.loss:.6f}")


@law("evaluate.as_trained", ["evaluate", "tokenize", "loss"], cases.EVALUATE_AS_TRAINED, examples=5, cost=2)
@oracle("the loss of the rows' own tokens")
def held_out_rows_are_rows(trainer: SubjectClient, case: cases.Looked) -> None:
    """Held-out rows become the same tokens as rows that are trained on."""
    given = {"model": trainer.model(case.model), "settings": PLAIN}
    rows = trainer.ask("tokenize", TokenRows, rows=case.values, **given).rows
    batch = [{"ids": row.ids, "targets": row.targets} for row in rows]
    wanted = trainer.ask("loss", Loss, batch=batch, **given)
    found = _look(trainer, case, case.values, case.batch_size)
    check(_near(found, wanted.loss), expected=f"loss {wanted.loss:.6f}", got=f"loss {found.loss:.6f}")


@law("evaluate.limit", ["evaluate", "tokenize"], cases.EVALUATE_LIMIT, examples=5, cost=2)
@oracle("the tokens that the rows become when they are trained on with the same limit, in float64")
def held_out_rows_keep_the_limit(trainer: SubjectClient, case: cases.Overlong) -> None:
    """Held-out rows that are longer than the limit are left out, or cut, as rows that are trained on are."""
    model = trainer.model(TINY)
    most = max(len(row.ids) for row in tokenized(trainer, model, case.values, {}).rows) - case.below
    limit = {"tokens.max_length": most, "tokens.truncation": case.policy}
    rows = [{"ids": row.ids, "targets": row.targets} for row in tokenized(trainer, model, case.values, limit).rows]
    wanted = trainer.oracle.ask("loss", Loss, model=model, settings=PLAIN, batch=rows)
    found = trainer.ask("evaluate", Loss, model=model, settings={**PLAIN, **limit}, rows=case.values)
    check(_near(found, wanted.loss), expected=f"loss {wanted.loss:.6f}", got=f"loss {found.loss:.6f}")
    check(found.count in (None, wanted.count), expected=f"{wanted.count} tokens", got=f"{found.count} tokens")


@law("evaluate.file", ["measure_file"], cases.ON_FILE, examples=3, cost=6)
@oracle("what the run measured on the same rows while it trained, and the base's loss on their own tokens in float64")
def file_gives_what_the_run_measured(trainer: SubjectClient, case: cases.OnFile) -> None:
    """A file of rows that a run held out gives, when the run is measured on it, the losses that the run itself had."""
    given = {"model": trainer.model(TINY), "settings": case.settings}
    found = trainer.ask("measure_file", MeasuredTwice, rows=case.values, valid=case.held, **given)
    wanted = trainer.oracle.ask("evaluate", Loss, rows=case.held, **given)
    check(found.count == wanted.count, expected=f"{wanted.count} tokens", got=f"{found.count} tokens")
    for name, one, other in (
        ("base", wanted.loss, found.run.base),
        ("base", found.run.base, found.file.base),
        ("tuned", found.run.tuned, found.file.tuned),
    ):
        near = abs(one - other) <= 1e-3 * (1 + abs(one))
        check(near, expected=f"{name} model: loss {one:.6f}", got=f"loss {other:.6f}")


def _generate(trainer: SubjectClient, case: cases.Asked, prompts: list[list[int]], **more: object) -> list[list[int]]:
    settings = {**PLAIN, "evaluation.max_new_tokens": case.most}
    given = {"model": trainer.model(case.model), "settings": settings, **more}
    return trainer.ask("generate", Generated, prompts=prompts, **given).answers


@law("generate.alone", ["generate"], cases.ASKED, examples=6)
@oracle("each prompt asked alone")
def answer_stands_alone(trainer: SubjectClient, case: cases.Asked) -> None:
    """An answer does not depend on what else is asked at the same time."""
    prompts = [list(prompt) for prompt in case.prompts]
    together = _generate(trainer, case, prompts)
    alone = [_generate(trainer, case, [prompt])[0] for prompt in prompts]
    check(together == alone, expected=alone, got=together)


@law("generate.many", ["generate"], cases.GENERATE_MANY, examples=3, cost=2)
@oracle("each of the questions asked alone")
def answers_do_not_depend_on_their_number(trainer: SubjectClient, case: cases.Crowd) -> None:
    """An answer is the same however many questions are asked, also where they are more than are answered at once."""
    given = {"model": trainer.model(TINY), "settings": {**PLAIN, "evaluation.max_new_tokens": 4}}
    alone = [trainer.ask("generate", Generated, prompts=[list(one)], **given).answers[0] for one in case.prompts]
    found = trainer.ask("generate", Generated, prompts=case.questions, **given).answers
    check(len(found) == case.count, expected=f"{case.count} answers", got=f"{len(found)} answers")
    odd = [number for number, said in enumerate(found) if said != alone[number % len(alone)]]
    first = [found[number] for number in odd[:3]]
    check(not odd, expected=f"{alone} in turn", got=f"others from question {odd[:1]} on: {first}")


@law("generate.greedy", ["generate"], cases.ASKED, examples=6)
@oracle("the same prompt in float64; where two tokens are as likely there, what follows either is right")
def answer_is_the_likeliest(trainer: SubjectClient, case: cases.Asked) -> None:
    """An answer is what the model finds likeliest, token by token, without the prompt and no longer than it may be."""
    prompts = [list(prompt) for prompt in case.prompts]
    found, wanted = (_generate(each, case, prompts) for each in (trainer, trainer.oracle))
    for prompt, answer, right in zip(prompts, found, wanted, strict=True):
        check(len(answer) <= case.most, expected=f"at most {case.most} tokens", got=answer)
        if answer != right:
            check(_tie(trainer, case, prompt, answer, right), expected=right, got=answer)


def _tie(trainer: SubjectClient, case: cases.Asked, prompt: list[int], answer: list[int], right: list[int]) -> bool:
    """Whether, where they part, both say what is as likely in float64; an end is any control token."""
    at = next((place for place, (one, two) in enumerate(zip(answer, right, strict=False)) if one != two), None)
    at = min(len(answer), len(right)) if at is None else at
    given = {"model": trainer.model(case.model), "settings": PLAIN, "prompts": [[*prompt, *right[:at]]]}
    told = trainer.oracle.ask("logits", Logits, **given)
    last = np.asarray(trainer.oracle.tensors(told.file)["0"], np.float64)[-1]
    first, second = (
        last[said[at]] if at < len(said) else last[: len(CONTROL_TOKENS)].max() for said in (answer, right)
    )
    # Either logit may be off by what `same_logits` lets pass.
    return bool(abs(first - second) <= 2 * 2e-3 * (1 + np.abs(last).max()))


@law("generate.fits", ["generate"], cases.GENERATE_FITS, examples=4)
@oracle("the model's own config")
def answer_fits_the_context(trainer: SubjectClient, case: cases.Full) -> None:
    """Prompt and answer together are never longer than what the model reads."""
    model = altered(trainer, trainer.model(TINY), {"max_position_embeddings": case.context})
    settings = {**PLAIN, "tokens.max_length": 8, "evaluation.max_new_tokens": 30}
    prompt = [*range(20, 20 + case.length)]
    [answer] = trainer.ask("generate", Generated, model=model, settings=settings, prompts=[prompt]).answers
    room = case.context - case.length
    check(len(answer) <= room, expected=f"at most {room} tokens", got=f"{len(answer)} tokens")


_ROPE_PROMPT = [9, 40, 77, 15, 130, 61, 22]


@law("model.rope_spelling", ["logits"], cases.SPELLINGS, cost=2, examples=4)
@oracle("the logits of our trainer in float64, which reads both, as transformers does")
def rope_is_read(trainer: SubjectClient, case: cases.Spelling) -> None:
    """A model's rotary positions have the base that its config.json says, by the newer name and by the older."""
    folder = trainer.folder() / "model"
    build_model(TINY, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("rope_theta", None)
    config |= {case.key: case.theta if case.key == "rope_theta" else {"rope_type": "default", "rope_theta": case.theta}}
    file.write_text(json.dumps(config), encoding="utf-8")
    right, found = (
        each.tensors(each.ask("logits", Logits, model=folder, settings=PLAIN, prompts=[_ROPE_PROMPT]).file)["0"]
        for each in (trainer.oracle, trainer)
    )
    away = float(np.abs(right - found).max())
    check(away <= 1e-3, expected=f"logits as with base {case.theta:g}", got=f"logits up to {away:.4f} away from them")
