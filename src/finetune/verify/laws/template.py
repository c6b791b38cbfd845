"""Laws of rows on their way to tokens: what they become as text, and which tokens that is."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from finetune.verify.catalogue import law, oracle
from finetune.verify.check import check
from finetune.verify.client import SubjectClient
from finetune.verify.laws.helpers import accepted, comparable, refused, text_of, tokenized, tokenized_row
from finetune.verify.laws.transcript import OwnTokenizer, written_out
from finetune.verify.subjects.answers import RenderedText, TokenIds, TrainingResult
from finetune.verify.subjects.subject import UnsupportedError
from finetune_strategies.cases import template as cases
from finetune_strategies.cases.dialogues import CONTROL, TOOLS, Dialogue, Rich
from finetune_strategies.cases.rows import PLAIN, TINY


def _rendered(trainer: SubjectClient, case: Dialogue, *, prompt: bool = False) -> str:
    given = {**PLAIN, "template.name": case.template}
    messages = case.messages[:-1] if prompt else case.messages
    model = trainer.model(TINY)
    return trainer.ask("render", RenderedText, model=model, settings=given, messages=messages, prompt=prompt).text


def _chatml(messages: list[dict[str, str]], *, prompt: bool) -> str:
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if prompt else "")


def _alpaca(messages: list[dict[str, str]], *, prompt: bool) -> str:
    system = [message["content"] for message in messages if message["role"] == "system"]
    usual = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    turns = [
        f"### Instruction:\n{message['content']}"
        if message["role"] == "user"
        else f"### Response:\n{message['content']}</s>"
        for message in messages
        if message["role"] != "system"
    ]
    return "\n\n".join([*(system or [usual]), *turns, *(["### Response:\n"] if prompt else [])])


_OWN = {"template.name": "tokenizer", "tokens.max_length": 1000}
_FORMATS: Mapping[str, Callable[..., str]] = {"chatml": _chatml, "tokenizer": _chatml, "alpaca": _alpaca}


@law("template.bytes", ["render"], cases.TEMPLATE_BYTES, examples=12)
@oracle("the format written out by hand: OpenAI's ChatML, Stanford's Alpaca")
def format_is_the_public_one(trainer: SubjectClient, case: Dialogue) -> None:
    """A conversation is rendered in the public format of its template, byte for byte, to train on it and to ask."""
    written = _FORMATS[case.template]
    for prompt, messages in ((False, case.messages), (True, case.messages[:-1])):
        text, expected = _rendered(trainer, case, prompt=prompt), written(messages, prompt=prompt)
        check(text == expected, expected=repr(expected), got=repr(text))


@law("template.prompt", ["render"], cases.TEMPLATE_PROMPT, examples=10)
@oracle("the text to train on")
def prompt_is_how_training_begins(trainer: SubjectClient, case: Dialogue) -> None:
    """What the model is asked with is how the text that it was trained on begins."""
    whole, prompt = _rendered(trainer, case), _rendered(trainer, case, prompt=True)
    check(whole.startswith(prompt), expected=f"a text that begins with {prompt!r}", got=repr(whole))
    answer = case.turns[-1].completion
    check(whole[len(prompt) :].startswith(answer), expected=f"then {answer!r}", got=repr(whole[len(prompt) :]))


@law("template.words", ["render"], cases.TEMPLATE_WORDS, examples=10)
@oracle("the messages themselves")
def words_are_kept(trainer: SubjectClient, case: Dialogue) -> None:
    """What is said stands in the text as it was said and in its order, the system's words and braces among it."""
    text, at = _rendered(trainer, case), 0
    for message in case.messages:
        found = text.find(message["content"], at)
        check(found >= 0, expected=f"{message['role']}: {message['content']!r}", got=repr(text[at:]))
        at = found + len(message["content"])


@law("template.trained", ["render", "tokenize"], cases.TEMPLATE_TRAINED, examples=10)
@oracle("the text as it is rendered: the model's tokenizer has one token for each byte")
def tokens_are_those_of_the_text(trainer: SubjectClient, case: Dialogue) -> None:
    """The tokens that are trained on are those of the text that is rendered."""
    model, expected = trainer.model(TINY), _rendered(trainer, case)
    settings = {"template.name": case.template, "tokens.max_length": 1000}
    said = text_of(trainer.words(model), tokenized_row(trainer, model, {"messages": case.messages}, settings))
    check(said == expected.encode(), expected=repr(expected), got=repr(said.decode(errors="replace")))


@law("template.inert", ["tokenize"], cases.TEMPLATE_INERT, examples=14)
@oracle("the control tokens of a row in which nothing is written like one")
def words_are_inert(trainer: SubjectClient, case: cases.Spoken) -> None:
    """Nothing that somebody says becomes a control token."""
    model = trainer.model(TINY)
    found = tokenized(trainer, model, [case.plain.value, case.value], {"tokens.max_length": 1000}).rows
    words = trainer.words(model)
    said = [[words.get(token, b"?").decode("latin1") for token in row.ids] for row in found]
    control = [[word for word in row if word in CONTROL] for row in said]
    check(len(control) == 2, expected="2 rows", got=f"{len(control)} rows")
    check(control[0] == control[1], expected=control[0], got=control[1])


@law("template.beside", ["tokenize"], cases.TEMPLATE_BESIDE, examples=8)
@oracle("the model's template as jinja2 renders it: the model's tokenizer has one token for each byte")
def what_stands_beside_a_text_is_kept(trainer: SubjectClient, case: Rich) -> None:
    """Thoughts, calls, their results and tools become what the template makes of them, and nothing is lost of it."""
    model = trainer.model(TOOLS)
    row = tokenized_row(trainer, model, case.value, _OWN)
    said, expected = text_of(trainer.words(model), row), written_out(model, case.messages, case.given)
    check(all(word in expected for word in case.words), expected=f"{case.words} in the text", got=repr(expected))
    check(said == expected.encode(), expected=repr(expected), got=repr(said.decode(errors="replace")))


@law("template.ids", ["tokenize"], cases.MERGED, examples=14)
@oracle("the tokenizers library, given the text as jinja2 renders it")
def ids_are_those_of_a_server(trainer: SubjectClient, case: cases.Encoded) -> None:
    """The ids of a row are its whole text's; where its last answer is asked for with others, these and the rest's."""
    model = trainer.model(case.model)
    row, tokenizer = tokenized_row(trainer, model, {"messages": case.messages}, _OWN), OwnTokenizer(model)
    text = written_out(model, case.messages)
    asked = written_out(model, case.messages[:-1], prompt=True)
    whole, prompt = tokenizer.ids(text), tokenizer.ids(asked)
    begins = whole[: len(prompt)] == prompt
    expected = whole if begins else prompt + tokenizer.ids_of_rest(text[len(asked) :])
    check(row.ids == expected, expected=expected, got=row.ids)


@law("template.variables", ["tokenize"], cases.VARIABLES, examples=6)
@oracle("the model's template as jinja2 renders it, with the variable and without")
def variables_are_not_passed_over(trainer: SubjectClient, case: cases.Varied) -> None:
    """A variable that a row sets changes the text as its template says, or the row is refused."""
    model = trainer.model(TOOLS)
    given, plain = (written_out(model, case.messages, more) for more in (case.variables, {}))
    found = refused(lambda: tokenized(trainer, model, [case.value], _OWN))
    said = [text_of(trainer.words(model), row).decode(errors="replace") for row in found.rows] if found else []
    wanted = [] if given == plain else [given]
    check(said == wanted, expected=wanted or "the row is refused", got=said)


@law("template.refuses", ["tokenize"], cases.REFUSED, examples=6)
@oracle("the rows without the one that the template refuses")
def refused_rows_cost_themselves(trainer: SubjectClient, case: cases.Refused) -> None:
    """A row that the template refuses is left out and counted, and no other with it."""
    model = trainer.model(TOOLS)
    found = accepted(lambda: tokenized(trainer, model, case.values, _OWN), "a file with a row that is refused")
    others = [row for place, row in enumerate(case.values) if place != case.place]
    expected = [(ids, targets) for _, ids, targets in comparable(tokenized(trainer, model, others, _OWN))]
    check(
        [(row.ids, row.targets) for row in found.rows] == expected,
        expected=f"{len(expected)} rows, without number {case.place}",
        got=f"rows {[row.row for row in found.rows]}",
    )
    check(sum(found.dropped.values()) == 1, expected="1 row left out", got=found.dropped)


@law("template.parts", ["tokenize"], cases.PARTS, examples=6)
@oracle("the row with its texts in one piece")
def parts_are_a_text(trainer: SubjectClient, case: cases.InParts) -> None:
    """Content in parts of text is that text, the parts on lines of their own."""
    model = trainer.model(TINY)
    whole = tokenized_row(trainer, model, {"messages": case.messages}, _OWN)
    parts = accepted(lambda: tokenized_row(trainer, model, {"messages": case.in_parts}, _OWN), "content in parts")
    check(parts == whole, expected=whole.ids, got=parts.ids)


@law("template.blocks", ["tokenize"], cases.BLOCKED, examples=6)
@oracle("the word that stands in the part")
def parts_are_never_lost(trainer: SubjectClient, case: cases.Blocked) -> None:
    """A part of a message that is no plain text is kept, or its row is left out and counted: it is never lost alone."""
    model = trainer.model(TINY)
    found = refused(lambda: tokenized(trainer, model, [case.pair.model_dump(), case.value], _OWN))
    if found is None:
        return
    said = [text_of(trainer.words(model), row) for row in found.rows if row.row == 1]
    kept = bool(said) and case.word.encode() in said[0]
    check(kept or not said, expected=f"a row with {case.word}, or none", got=said)
    check(kept or sum(found.dropped.values()) == 1, expected="1 row left out", got=found.dropped)


@law("template.ends", ["tokenize"], cases.TEMPLATE_ENDS, examples=6)
@oracle("the bytes of the text")
def text_ends(trainer: SubjectClient, case: cases.PlainText) -> None:
    """A plain text is learned whole, and the end-of-text token after it."""
    model = trainer.model(TINY)
    rows = tokenized(trainer, model, [{"text": case.text}], {}).rows
    found = [text_of(trainer.words(model), row).decode(errors="replace") for row in rows]
    check(found == [f"{case.text}</s>"], expected=[f"{case.text}</s>"], got=found)
    check(all(rows[0].targets[1:]), expected="every token is learned", got=rows[0].targets)


@law("template.bos", ["tokenize"], cases.BEGUN, examples=14)
@oracle("the tokenizer's files, which say whether one is added")
def beginning_is_marked_once(trainer: SubjectClient, case: cases.Begun) -> None:
    """A text begins with one begin-of-text token where the model wants one, and has none elsewhere."""
    model = trainer.model(case.model)
    row = tokenized_row(trainer, model, case.pair.model_dump(), {"template.name": case.template})
    places = [place for place, token in enumerate(row.ids) if trainer.words(model).get(token) == b"<s>"]
    expected = [0] if case.model.begins else []
    check(places == expected, expected=f"<s> at {expected} with {case.model.bos}", got=f"<s> at {places}")


@law("template.asked", ["tokenize", "prompt"], cases.BEGUN, examples=8)
@oracle("the tokens to train on, up to the first that is learned")
def tokens_to_ask_begin_those_to_train_on(trainer: SubjectClient, case: cases.Begun) -> None:
    """The tokens that a model is asked with are how those that it was trained on begin."""
    model, settings = trainer.model(case.model), {**PLAIN, "template.name": case.template}
    row = tokenized_row(trainer, model, case.pair.model_dump(), settings)
    messages = [{"role": "user", "content": case.pair.prompt}]
    ids = trainer.ask("prompt", TokenIds, model=model, settings=settings, messages=messages).ids
    before = row.ids[: row.targets.index(True)] if True in row.targets else row.ids
    check(ids == before, expected=before, got=ids)


@law("template.stops", ["tokenize", "stops"], cases.TEMPLATE_STOPS, examples=8)
@oracle("the tokens that the trainer stops at")
def answers_end_where_it_stops(trainer: SubjectClient, case: cases.Ended) -> None:
    """What ends an answer is learned, and is what the model stops at."""
    model, settings = trainer.model(TINY), {**PLAIN, "template.name": case.template}
    stops = trainer.ask("stops", TokenIds, model=model, settings=settings).ids
    words = trainer.words(model)
    for row in tokenized(trainer, model, case.values, settings).rows:
        learned = [token for token, target in zip(row.ids, row.targets, strict=True) if target]
        while learned and words.get(learned[-1]) == b"\n":
            learned.pop()
        check(learned and learned[-1] in stops, expected=f"one of {stops} in the end", got=learned[-3:])


@law("template.travels", ["train", "tokenize"], cases.TEMPLATE_TRAVELS, examples=3, cost=4)
@oracle("the tokens that were trained on")
def template_travels(trainer: SubjectClient, case: cases.Ended) -> None:
    """The tokenizer and the template that lie by an adapter make the tokens that it was trained on."""
    model = trainer.model(cases.BEGINNINGS[2])
    settings = {**PLAIN, "template.name": case.template}
    trained = {
        "model": model,
        "settings": {**settings, "training.batch_size": 1, "training.max_steps": 1},
        "rows": case.values,
    }
    course = trainer.ask("train", TrainingResult, **trained, folder=trainer.folder() / "run")
    check(course.adapter, expected="an adapter", got="none when training has ended")
    saved = Path(str(course.adapter))
    if not (saved / "tokenizer.json").is_file():
        raise UnsupportedError("no tokenizer lies by its adapters")
    shipped = trainer.folder() / "shipped"
    shutil.copytree(model, shipped)
    for file in saved.glob("*token*.json"):
        shutil.copy(file, shipped)
    template = saved / "chat_template.jinja"
    if template.is_file():
        shutil.copy(template, shipped)
    expected = comparable(tokenized(trainer, model, case.values, settings))
    found = comparable(tokenized(trainer, shipped, case.values, {"template.name": "tokenizer"}))
    check(found == expected, expected=expected, got=found)
