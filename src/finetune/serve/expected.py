"""What a served model must reproduce: the ids of prompts, and the run's own answers."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from finetune.chat.catalog import Variable
from finetune.chat.encoder import Encoder
from finetune.config import load_plan
from finetune.errors import FineTuneError, ModelError, TemplateError
from finetune.evidence.asked import what_to_ask
from finetune.evidence.saved import open_encoder, prepare_again
from finetune.export.corpus import nasty_texts
from finetune.export.gguf_source import Exportable, all_stops
from finetune.export.vocabulary import describe_vocabulary
from finetune.models.locate import locate_model
from finetune.records import Conversation, Message
from finetune.run.folder import RunFolder
from finetune.serve.derive import drawn_conversations, trims_in_part
from finetune.serve.messages import Messages, chat_messages, conversations_of, unservable_reason

_SPACES_OF_ASCII = " \t\n\r\v\f"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as a chat API takes it, and its ids in training."""

    messages: Messages
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ServedQuestion:
    """A question of the run, the tuned model's answer, and the right one.

    The run has no answer to a prompt that prints another day than in training: the trainer is to be asked (`given` is
    None).
    """

    prompt: Prompt
    given: str | None
    expected: str


@dataclass(frozen=True, slots=True)
class ServingCheck:
    """Everything that a served model is compared with.

    Attributes:
        encoder: the run's template and tokenizer.
        today: the day of the server's clock; None where it prints what we do.
        context: the longest sequence seen in training, in tokens.
        most: the largest number of tokens of an answer.
        stops: the control tokens at which an answer ends.
        texts: contents of drawn messages, without control tokens.
        prompts: drawn conversations.
        odd_prompts: drawn conversations in which a message begins or ends with space that not every server strips
            as the template does, or is empty where the template asks whether it is.
        questions: the run's own.
        notes: what was left out, and why.
        variables: what all training rows set for their template, as JSON: the server is asked with that.
    """

    encoder: Encoder
    today: date | None
    context: int
    most: int
    stops: tuple[str, ...]
    texts: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    odd_prompts: tuple[Prompt, ...]
    questions: tuple[ServedQuestion, ...]
    notes: tuple[str, ...]
    variables: str = ""

    @property
    def given(self) -> dict[str, Any]:
        """The variables by name."""
        found: dict[str, Any] = json.loads(self.variables or "{}")
        return found

    @property
    def bos(self) -> str:
        """The begin-of-text token that a server itself puts before every prompt, or ""."""
        return self.encoder.tokenizer.bos if self.encoder.tokenizer.adds_bos else ""

    def render(self, conversation: Conversation) -> str:
        """The prompt as text.

        Raises:
            TemplateError: the template refuses these roles.
        """
        return self.encoder.template.render_prompt(replace(conversation, variables=self.variables)).text


def prepare_serving_check(path: Path, exportable: Exportable, *, today: date | None = None) -> ServingCheck:
    """Prepare the check of a finished run.

    Args:
        today: what the server itself prints where a template asks for the date; None where it prints what we do.

    Raises:
        FineTuneError: the run is not finished, or its model or template cannot be used any more.
    """
    folder = RunFolder.finished(path)
    config = load_plan(folder.plan).config
    location = locate_model(config.model.path, revision=config.model.revision)
    variables = _shared_variables(folder)
    trained = open_encoder(folder, config, location)
    encoder = open_encoder(folder, config, location, today=today, given=_clock(today)) if today else trained
    if today and "enable_thinking" not in json.loads(variables or "{}"):
        _refuse_thinking(trained, lambda: open_encoder(folder, config, location, given={"enable_thinking": True}))
    tokenizer, length = encoder.tokenizer, config.tokens.max_length
    assert length is not None
    vocabulary = describe_vocabulary(tokenizer.description(), exportable.special, exportable.rows)
    texts = [
        text
        for text in nasty_texts((), vocabulary.form)
        if not any(token in text for token in tokenizer.control_tokens)
    ]
    context, most = min(length, exportable.described.tried_context), config.evaluation.max_new_tokens
    early = frozenset(all_stops(exportable, vocabulary)).difference(encoder.stop_ids)
    questions, notes = _questions(folder, trained, encoder, early)
    drawn = [replace(each, variables=variables) for each in drawn_conversations(texts)]
    prompts = _prompts(encoder, drawn, context)
    return ServingCheck(
        encoder=encoder,
        today=today,
        context=context,
        most=most,
        stops=tuple(token for token in tokenizer.control_tokens if tokenizer.control_id(token) in encoder.stop_ids),
        texts=tuple(texts),
        prompts=tuple(prompt for prompt, odd in prompts if not odd),
        odd_prompts=tuple(prompt for prompt, odd in prompts if odd),
        questions=tuple(asked for asked in questions if len(asked.prompt.ids) + most <= context),
        notes=notes,
        variables=variables,
    )


def _shared_variables(folder: RunFolder) -> str:
    """What all training rows set for their template; "" where they set nothing, or not the same."""
    shared = folder.read_manifest()["data"].get("variables")
    return str(shared["text"]) if isinstance(shared, dict) else ""


def _refuse_thinking(trained: Encoder, opened: Callable[[], Encoder]) -> None:
    """llama.cpp's server sets `enable_thinking` in every template, and a run may have been trained without it."""
    asked = Conversation((Message("user", "a"),), "template probe")
    served: tuple[int, ...] = ()
    with suppress(TemplateError):  # with it, the template may not even ask as it trains
        served = opened().prompt_ids(asked)
    if served != trained.prompt_ids(asked):
        raise TemplateError(
            f"template {trained.template.name!r} asks otherwise where enable_thinking is set, which llama.cpp's server "
            "sets by itself, and this run was trained without it",
            hint="train with template.variables {enable_thinking: false}, or true: then it counts before the server's",
        )


def _clock(today: date) -> dict[str, Variable]:
    """The variables of the day that llama.cpp's server gives every template: Llama 3.1's reads the first of them."""
    return {"date_string": f"{today:%d %b %Y}", "datetime": f"{today:%b %d %Y}"}


def _prompts(encoder: Encoder, conversations: Sequence[Conversation], context: int) -> tuple[tuple[Prompt, bool], ...]:
    """The prompts that fit, and whether a server may make others of them: such are counted and not held against it."""
    prompts = []

    def render(asked: Conversation) -> str:
        return encoder.template.render_prompt(asked).text

    for conversation in conversations:
        try:
            ids = encoder.prompt_ids(conversation)
        except TemplateError:
            continue
        if len(ids) < context:
            prompt = Prompt(chat_messages(conversation), ids)
            prompts.append((prompt, _is_odd(prompt) or trims_in_part(render, conversation)))
    return tuple(prompts)


def _is_odd(prompt: Prompt) -> bool:
    """Whether a message begins or ends with space that Python strips and llama.cpp's C++ does not."""
    return any(text.strip() != text.strip(_SPACES_OF_ASCII) for text in (each["content"] for each in prompt.messages))


def _questions(
    folder: RunFolder, encoder: Encoder, served: Encoder, early: frozenset[int]
) -> tuple[list[ServedQuestion], tuple[str, ...]]:
    """The run's questions with their conversations, which only its data still has.

    Raises:
        ModelError: an answer holds one of the `early` tokens, at which the server would end it before the run does.
    """
    manifest = folder.read_manifest()
    said: list[dict[str, Any]] = (((manifest.get("scores") or {}).get("learning") or {}).get("tuned") or {}).get(
        "answers", []
    )
    if not said:
        return [], ("the run asked no questions, so no answers were compared",)
    try:
        prepared = prepare_again(folder)
    except FineTuneError as error:
        return [], (f"answers were not compared: {error.message}",)
    questions = what_to_ask(prepared).learning
    if len(questions) != len(said):
        return [], (f"answers were not compared: of {len(said)} questions there are {len(questions)} now",)
    known, told, found = conversations_of(encoder, prepared), Counter[str](), []
    for question, answer in zip(questions, said, strict=True):
        if early.intersection(question.answer):
            token = encoder.tokenizer.word(next(each for each in question.answer if each in early))
            raise ModelError(
                f"the answer to {question.text[:80]!r} goes on after {token!r}, and llama.cpp, and so Ollama, ends an "
                "answer there, for its name, whatever the file says",
                hint="train with another name for that token",
            )
        conversation = known[question.ids]
        why = unservable_reason(encoder, conversation, _shared_variables(folder))
        if why:
            told[f"{why}: not asked"] += 1
            continue
        right, own = encoder.tokenizer.decode(question.answer).strip(), answer["given"]
        given = right if own == answer["expected"] else encoder.tokenizer.without_special(own).strip()
        ids = served.prompt_ids(conversation)
        if ids != question.ids:
            told["print the day, which was another in training (template.date): the trainer was asked them anew"] += 1
        found.append(
            ServedQuestion(Prompt(chat_messages(conversation), ids), given if ids == question.ids else None, right)
        )
    return found, tuple(f"{count} of the questions {what}" for what, count in told.items())
