"""A run's conversations as a chat API takes them, and what it answers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from finetune.chat.beside import is_rich, join_inputs
from finetune.chat.encoder import Encoder
from finetune.records import Conversation, Message
from finetune.training.prepare import Prepared

Messages = tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer, whether it ended by itself, and the number of prompt tokens; None where the server omits it.

    One that is not `read` came as plain text, for the chat API refuses its format.
    """

    text: str
    ended: bool
    prompt_tokens: int | None
    read: bool = True


def chat_messages(conversation: Conversation) -> Messages:
    """The conversation for a chat API, an input joined to its question as templates that know none have it."""
    joined = join_inputs(conversation.messages)
    return tuple({"role": message.role, "content": message.content} for message in joined)


def unservable_reason(encoder: Encoder, conversation: Conversation, variables: str = "") -> str:
    """Why a server cannot be asked this, with these variables, as training asked it; empty where it can."""
    if encoder.template.name == "alpaca" and any(each.role == "input" for each in conversation.messages):
        return "have an input of their own, a role that no chat API has"
    if encoder.template.held(conversation):
        return "hold a template's turns in their text, around which a server puts its own"
    if conversation.variables and same_variables(conversation.variables, variables):
        conversation = replace(conversation, variables="")
    if is_rich(conversation) or any(each.role in ("tool", "developer") for each in conversation.messages):
        return "have tools, thoughts, variables or a developer's message, which this check does not send"
    if has_control(chat_messages(conversation), encoder.tokenizer.control_tokens):
        return "have a control token's name in their text, which servers take for it"
    return ""


def same_variables(one: str, other: str) -> bool:
    """Whether two JSON objects are the same; the order of their names is none."""
    return bool(json.loads(one or "{}") == json.loads(other or "{}"))


def has_control(messages: Messages, tokens: Sequence[str]) -> bool:
    """Whether a message has a control token's name in its text: plain text in training, and to servers the token."""
    return any(token in each["content"] for each in messages for token in tokens)


def conversations_of(encoder: Encoder, prepared: Prepared) -> dict[tuple[int, ...], Conversation]:
    """The conversations of a run's questions, by the ids of their prompts; those of retention are single questions."""
    known = {encoder.prompt_ids(each.prompt): each.prompt for each in prepared.conversations}
    for question in prepared.retention:
        single = Conversation((Message("user", question.text),), "retention")
        known.setdefault(encoder.prompt_ids(single), single)
    return known
