"""llama.cpp's server as a way to compute what was trained: asked as its users ask it, by conversations."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.assembly.encoder import Encoder
from finetune.assembly.prepare import Prepared
from finetune.convert.drift import Asked, Ids, Told
from finetune.deploy.llama_server import llama_server
from finetune.errors import DeploymentError, EvidenceError, ModelError
from finetune.records import Conversation, Message

Messages = Sequence[Mapping[str, str]]


def ask_server(file: Path, asked: Asked, known: Mapping[Ids, Conversation]) -> Told:
    """Serve a GGUF file, and ask it everything over its chat API; of distributions that API tells too little.

    Args:
        known: conversations by the ids of their prompts.

    Raises:
        ModelError: a prompt is of no conversation that can be told to a server.
        EvidenceError: the server makes other ids of a conversation than were trained on, or does not answer.
    """
    conversations = [_messages(prompt, known) for prompt in asked.prompts]
    longest = max(len(prompt) + steps for prompt, steps in zip(asked.prompts, asked.steps, strict=True))
    try:
        with llama_server(file, context=longest + 1, name="compared") as server:
            for prompt, messages in zip(asked.prompts, conversations, strict=True):
                if (made := server.rendered_ids(messages)) != prompt:
                    raise EvidenceError(
                        f"of {messages[-1]['content'][:60]!r} the server makes {len(made)} tokens, {list(made)[:20]}, "
                        f"and training made {len(prompt)}, {list(prompt)[:20]}"
                    )
            answers = [
                server.chat_ids(messages, most=steps)
                for messages, steps in zip(conversations, asked.steps, strict=True)
            ]
    except DeploymentError as error:
        raise EvidenceError(error.message, hint=error.hint) from None
    return Told(asked.cut(answers), None)


def _messages(prompt: Ids, known: Mapping[Ids, Conversation]) -> Messages:
    """What to tell a server so that it makes this prompt."""
    conversation = known.get(prompt)
    if conversation is None or any(message.role == "input" for message in conversation.messages):
        raise ModelError("a question is of no conversation that a chat API has")
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


def conversations_of(encoder: Encoder, prepared: Prepared) -> dict[Ids, Conversation]:
    """The conversations of a run's questions, by the ids of their prompts; those of retention are single questions."""
    known = {encoder.prompt_ids(each.prompt): each.prompt for each in prepared.conversations}
    for question in prepared.retention:
        single = Conversation((Message("user", question.text),), "retention")
        known.setdefault(encoder.prompt_ids(single), single)
    return known
