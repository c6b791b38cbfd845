"""Laws of serving: the recipe that is left says what was trained, and nothing can be put into it by a text."""

from pathlib import Path

from finetune.verify.catalogue import law, oracle
from finetune.verify.check import check
from finetune.verify.client import SubjectClient
from finetune.verify.laws.modelfile_reader import NoModelfileError, read_modelfile
from finetune.verify.subjects.answers import RenderedText, Served
from finetune.verify.subjects.subject import RefusesError
from finetune_strategies.cases import serve as cases
from finetune_strategies.cases.rows import PLAIN, TINY


@law("serve.recipe", ["serving"], cases.SERVE_RECIPE, examples=10)
@oracle("a reader made from Ollama's published grammar")
def recipe_says_what_it_was_given(trainer: SubjectClient, case: cases.Licensed) -> None:
    """A server's recipe, read as the server reads it, says the file, template, stops and licence, and nothing else."""
    given = {"model": trainer.model(TINY), "settings": PLAIN, "license": case.text}
    found = trainer.ask("serving", Served, **given)
    file = Path(found.modelfile)
    if not file.is_file():
        check('"""' in case.text, expected="a recipe", got="none")
        return
    try:
        commands = read_modelfile(file.read_text(encoding="utf-8"))
    except NoModelfileError as error:
        commands = [("error", str(error))]
    licence = [("license", case.text.strip() if case.text.strip() else case.text)] if case.text else []
    kept = [(name, value) for name, value in commands if name in ("from", "template", "license")]
    wanted = [("from", "./model.gguf"), ("template", found.template)]
    check(kept[:2] == wanted, expected=wanted, got=kept[:2])
    check(
        [value for _, value in kept[2:]] in ([case.text], [value for _, value in licence]), expected=licence, got=kept
    )
    stops = [value for name, value in commands if name == "stop"]
    check("<|im_end|>" in stops, expected="a stop at <|im_end|>, which ends an answer", got=stops)
    others = {name for name, _ in commands} - {"from", "template", "license", "stop", "num_ctx"}
    check(not others, expected="no other command", got=sorted(others))


@law("serve.template", ["serving"], cases.SERVE_TEMPLATE, examples=6)
@oracle("the run's own template, and a reader of the server's language, neither of them the trainer's")
def served_prompt_is_the_trained_one(trainer: SubjectClient, case: cases.Question) -> None:
    """The template that a server is given makes of a conversation what training made of it."""
    found = trainer.ask("serving", Served, model=trainer.model(TINY), settings=PLAIN)
    given = {"model": trainer.model(TINY), "settings": PLAIN, "messages": case.messages, "prompt": True}
    wanted = trainer.oracle.ask("render", RenderedText, **given).text
    try:
        served = trainer.oracle.ask("render_served", RenderedText, template=found.template, messages=case.messages).text
    except RefusesError as error:
        served = f"(refused: {error})"
    check(served == wanted, expected=wanted, got=served)
