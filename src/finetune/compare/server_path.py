"""llama.cpp's server as an inference path, asked as its users ask it: by conversations."""

from collections.abc import Mapping
from pathlib import Path

from finetune.chat.encoder import Encoder
from finetune.errors import DeploymentError, EvidenceError, ModelError
from finetune.evidence.drift import Ids, InferenceRequest, InferenceResponse
from finetune.records import Conversation
from finetune.serve.llama_server import llama_server
from finetune.serve.messages import Messages, chat_messages, unservable_reason


def ask_server(
    file: Path, request: InferenceRequest, encoder: Encoder, known: Mapping[Ids, Conversation]
) -> InferenceResponse:
    """Serve a GGUF file and ask everything over its chat API, which reports no whole distributions.

    Args:
        encoder: the template and tokenizer of the run.
        known: conversations by the ids of their prompts.

    Raises:
        ModelError: a prompt is of no conversation that can be told to a server.
        EvidenceError: the server makes other ids of a conversation than were trained on, or does not answer.
    """
    conversations = [_messages(prompt, encoder, known) for prompt in request.prompts]
    longest = max(len(prompt) + steps for prompt, steps in zip(request.prompts, request.steps, strict=True))
    try:
        with llama_server(file, context=longest + 1, name="compared") as server:
            for prompt, messages in zip(request.prompts, conversations, strict=True):
                if (made := server.rendered_ids(messages)) != prompt:
                    raise EvidenceError(
                        f"of {messages[-1]['content'][:60]!r} the server makes {len(made)} tokens, {list(made)[:20]}, "
                        f"and training made {len(prompt)}, {list(prompt)[:20]}"
                    )
            answers = [
                server.chat_ids(messages, most=steps)
                for messages, steps in zip(conversations, request.steps, strict=True)
            ]
    except DeploymentError as error:
        raise EvidenceError(error.message, hint=error.hint) from None
    return InferenceResponse(request.cut(answers), None)


def _messages(prompt: Ids, encoder: Encoder, known: Mapping[Ids, Conversation]) -> Messages:
    """The messages of which a server makes this prompt."""
    conversation = known.get(prompt)
    why = unservable_reason(encoder, conversation) if conversation else "are of no conversation that a chat API has"
    if conversation is None or why:
        raise ModelError(f"of the questions some {why}")
    return chat_messages(conversation)
