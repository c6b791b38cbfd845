"""Laws of looking at a model: losses and answers do not depend on how they are asked for."""

from typing import Annotated, Any

from hypothesis import strategies as st
from pydantic import Field

from finetune.verify.doors.answers import Generated, Loss, TokenRows
from finetune.verify.recipes import ModelRecipe, Recipe
from finetune.verify.suite.cases import PLAIN, TINY, Rows, rows_of
from finetune.verify.suite.catalogue import law
from finetune.verify.suite.learned import MODELS, WIDE, altered
from finetune.verify.suite.trainer import Trainer
from finetune.verify.suite.verdicts import check


class Looked(Rows):
    """Rows to look at, so many at once."""

    batch_size: Annotated[int, Field(ge=1, le=5)]
    model: ModelRecipe = TINY


_LOOKED = st.builds(Looked, rows=rows_of(2, 5), batch_size=st.sampled_from([2, 3, 1, 5]), model=MODELS)


def _look(trainer: Trainer, case: Looked, rows: list[dict[str, str]], size: int) -> Loss:
    settings = {**PLAIN, "training.batch_size": size}
    return trainer.ask("evaluate", Loss, model=trainer.model(case.model), settings=settings, rows=rows)


def _near(found: Loss, wanted: float) -> bool:
    return abs(found.loss - wanted) <= 1e-3 * (1 + wanted)


@law(
    "evaluate.oracle",
    "The held-out loss is the mean surprise of all held-out tokens, however many rows are looked at at once.",
    needs=["evaluate", "tokenize"],
    oracle="the rows' own tokens in float64, all at once",
    cases=_LOOKED,
    examples=8,
    cost=2,
)
def held_out_loss_is_of_all_tokens(trainer: Trainer, case: Looked) -> None:
    """The loss, and the number of tokens where it is told."""
    given = {"model": trainer.model(case.model), "settings": PLAIN}
    rows = [
        {"ids": row.ids, "targets": row.targets}
        for row in trainer.ask("tokenize", TokenRows, rows=case.values, **given).rows
    ]
    wanted = trainer.oracle.ask("loss", Loss, batch=rows, **given)
    found = _look(trainer, case, case.values, case.batch_size)
    check(_near(found, wanted.loss), expected=f"loss {wanted.loss:.6f}", got=f"loss {found.loss:.6f}")
    check(found.count in (None, wanted.count), expected=f"{wanted.count} tokens", got=f"{found.count} tokens")


@law(
    "evaluate.order",
    "The held-out loss does not depend on the order of the rows.",
    needs=["evaluate"],
    oracle="the same rows the other way round",
    cases=_LOOKED,
    examples=4,
    cost=2,
)
def order_does_not_matter(trainer: Trainer, case: Looked) -> None:
    """The loss of the rows, and of the rows reversed."""
    here = _look(trainer, case, case.values, case.batch_size)
    there = _look(trainer, case, case.values[::-1], case.batch_size)
    check(_near(here, there.loss), expected=f"loss {there.loss:.6f}", got=f"loss {here.loss:.6f}")


@law(
    "evaluate.as_trained",
    "Held-out rows become the same tokens as rows that are trained on.",
    needs=["evaluate", "tokenize", "loss"],
    oracle="the loss of the rows' own tokens",
    cases=st.builds(Looked, rows=rows_of(1, 2), batch_size=st.just(2), model=MODELS),
    examples=5,
    cost=2,
)
def held_out_rows_are_rows(trainer: Trainer, case: Looked) -> None:
    """The held-out loss, and the loss of a batch of what the rows become in training."""
    given = {"model": trainer.model(case.model), "settings": PLAIN}
    rows = trainer.ask("tokenize", TokenRows, rows=case.values, **given).rows
    batch = [{"ids": row.ids, "targets": row.targets} for row in rows]
    wanted = trainer.ask("loss", Loss, batch=batch, **given)
    found = _look(trainer, case, case.values, case.batch_size)
    check(_near(found, wanted.loss), expected=f"loss {wanted.loss:.6f}", got=f"loss {found.loss:.6f}")


class PromptsCase(Recipe):
    """Prompts, and how long an answer may be."""

    prompts: Annotated[tuple[tuple[int, ...], ...], Field(min_length=1, max_length=3, strict=False)]
    most: Annotated[int, Field(ge=1, le=9)] = 5
    model: ModelRecipe = TINY


_ASKED = st.builds(
    PromptsCase,
    prompts=st.lists(st.lists(st.integers(6, 255), min_size=1, max_size=9).map(tuple), min_size=1, max_size=3).map(
        tuple
    ),
    most=st.integers(1, 6),
    model=st.sampled_from([WIDE, TINY]),
)


def _generate(trainer: Trainer, case: PromptsCase, prompts: list[list[int]], **more: Any) -> list[list[int]]:
    settings = {**PLAIN, "evaluation.max_new_tokens": case.most}
    given = {"model": trainer.model(case.model), "settings": settings, **more}
    return trainer.ask("generate", Generated, prompts=prompts, **given).answers


@law(
    "generate.alone",
    "An answer does not depend on what else is asked at the same time.",
    needs=["generate"],
    oracle="each prompt asked alone",
    cases=_ASKED,
    examples=6,
)
def answer_stands_alone(trainer: Trainer, case: PromptsCase) -> None:
    """All prompts at once, and one by one."""
    prompts = [list(prompt) for prompt in case.prompts]
    together = _generate(trainer, case, prompts)
    alone = [_generate(trainer, case, [prompt])[0] for prompt in prompts]
    check(together == alone, expected=alone, got=together)


@law(
    "generate.greedy",
    "An answer is what the model finds most likely, token by token, without the prompt and no longer than it may be.",
    needs=["generate"],
    oracle="the same prompt in float64; the first difference counts unless two tokens are as likely",
    cases=_ASKED,
    examples=6,
)
def answer_is_the_likeliest(trainer: Trainer, case: PromptsCase) -> None:
    """The ids of each answer."""
    prompts = [list(prompt) for prompt in case.prompts]
    found, wanted = (_generate(each, case, prompts) for each in (trainer, trainer.oracle))
    for answer, right in zip(found, wanted, strict=True):
        check(len(answer) <= case.most, expected=f"at most {case.most} tokens", got=answer)
        # Weights that are drawn leave the first token far ahead; what follows a tie may be anything.
        check(answer[:1] == right[:1], expected=right, got=answer)


class Full(Recipe):
    """A prompt, and how many tokens the model reads."""

    length: Annotated[int, Field(ge=4, le=12)]
    context: Annotated[int, Field(ge=8, le=12)]


@law(
    "generate.fits",
    "Prompt and answer together are never longer than what the model reads.",
    needs=["generate"],
    oracle="the model's own config",
    cases=st.builds(Full, length=st.sampled_from([9, 5]), context=st.sampled_from([10, 12])),
    examples=4,
)
def answer_fits_the_context(trainer: Trainer, case: Full) -> None:
    """A model that reads a dozen tokens is asked for 30."""
    model = altered(trainer, trainer.model(TINY), {"max_position_embeddings": case.context})
    settings = {**PLAIN, "tokens.max_length": 8, "evaluation.max_new_tokens": 30}
    prompt = [*range(20, 20 + case.length)]
    [answer] = trainer.ask("generate", Generated, model=model, settings=settings, prompts=[prompt]).answers
    room = case.context - case.length
    check(len(answer) <= room, expected=f"at most {room} tokens", got=f"{len(answer)} tokens")
