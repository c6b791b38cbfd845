"""Talks to the model of a finished run as it was trained: with its system prompt, its tools and its template."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config import load_plan
from finetune.errors import DataError
from finetune.evidence.saved import open_encoder, open_model, open_tuned
from finetune.models.locate import locate_model
from finetune.models.shape import read_shape
from finetune.ports import ChooseTokens
from finetune.records import Conversation, Message
from finetune.run.folder import RunFolder


@dataclass(frozen=True, slots=True)
class ChatOpening:
    """What every conversation of a chat begins with; `notes` say what of it the run itself gave."""

    messages: tuple[Message, ...]
    tools: str
    variables: str = ""
    notes: tuple[str, ...] = ()

    @property
    def asks(self) -> bool:
        """Whether it is a question already."""
        return bool(self.messages) and self.messages[-1].role in ("user", "tool")

    def followed_by(self, *turns: Message) -> Conversation:
        """The conversation that goes on with these turns."""
        return Conversation((*self.messages, *turns), "question", self.tools, self.variables)


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """What the model said, as it wrote it, and whether it ended by itself."""

    text: str
    ended: bool


def open_chat(
    path: Path, messages: tuple[Message, ...], system: str | None, tools: str | None, variables: str | None = None
) -> ChatOpening:
    """What a chat with a finished run begins with; what is not given is what all of its training rows have.

    Args:
        messages: those to begin with; they may have a system prompt of their own.
        system: the system prompt, "" for none.
        tools: a JSON list, "" for none.
        variables: a JSON object of what the template is given besides, "" for none.

    Raises:
        FineTuneError: the run is not finished.
    """
    data: dict[str, Any] = RunFolder.finished(path).read_manifest()["data"]
    notes: list[str] = []
    if system is None and not (messages and messages[0].role == "system"):
        system = _as_trained(data.get("system"), "--system", "a system prompt", notes)
    if tools is None:
        tools = _as_trained(data.get("tools"), "--tools", "tools", notes)
    if variables is None:
        variables = _as_trained(data.get("variables"), "--variables", "template variables", notes)
    first = (Message("system", system),) if system else ()
    return ChatOpening((*first, *messages), tools, variables, tuple(notes))


def _as_trained(shared: Any, option: str, what: str, notes: list[str]) -> str:
    """What all training rows have, with a note; where only some have it, a note says so."""
    if not isinstance(shared, dict):  # an older version wrote the run down
        return ""
    text, rows = str(shared["text"]), shared["rows"]
    if text:
        shown = ", ".join(_names(text)) if option == "--tools" else text
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        notes.append(f"asked as all {rows} training rows are, with {what}: {shown} ({option} changes that)")
    elif rows:
        notes.append(f"{rows} training rows have {what}, in {shared['different']} wordings: {option} gives one")
    return text


def _names(tools: str) -> list[str]:
    inner = [tool.get("function", tool) if isinstance(tool, dict) else {} for tool in json.loads(tools)]
    return [str(each.get("name", "?")) if isinstance(each, dict) else "?" for each in inner]


def talker(
    path: Path,
    *,
    max_new_tokens: int,
    choose: ChooseTokens | None = None,
    first: Conversation | None = None,
) -> Callable[[Conversation], ChatAnswer]:
    """A function that lets the fine-tuned model of a finished run answer a conversation; needs no data.

    Args:
        choose: chooses each token of an answer; greedy where none is given.
        first: a question that must be possible: refused before a weight is loaded.

    Raises:
        FineTuneError: as `evidence.reopen.reopen`, or the template cannot ask the first question.
    """
    folder = RunFolder.finished(path)
    config = load_plan(folder.plan).config
    location = locate_model(config.model.path, revision=config.model.revision)
    encoder = open_encoder(folder, config, location)
    context = read_shape(location.folder).context_length

    def ids_of(conversation: Conversation) -> tuple[int, ...]:
        ids = encoder.prompt_ids(conversation)
        if len(ids) >= context:
            raise DataError(
                f"the conversation has {len(ids)} tokens, and the model reads {context}", hint="ask something shorter"
            )
        return ids

    if first is not None:
        ids_of(first)
    session = open_tuned(folder, config, location, lambda place: open_model(config, place, encoder))

    def answer(conversation: Conversation) -> ChatAnswer:
        ids = ids_of(conversation)
        said = session.generate([ids], max_new_tokens, encoder.stop_ids, choose)[0]
        return ChatAnswer(encoder.said(said), len(said) < min(max_new_tokens, context - len(ids)))

    return answer
