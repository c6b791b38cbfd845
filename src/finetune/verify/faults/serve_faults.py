"""Faults of what is left for a server."""

from collections.abc import Callable
from dataclasses import replace

from finetune.chat.render import ChatTemplate
from finetune.records import Conversation, Rendered
from finetune.serve import modelfile, recipe
from finetune.serve.modelfile import Modelfile
from finetune.verify.faults.fault import fault, in_place_of, plant

Rendering = Callable[..., Rendered]


@fault("A240", "serve.no_template", "ollama #6821, unsloth #449")
def _no_template() -> None:
    """The recipe for a server names no template."""
    plant(recipe, "write_modelfile", lambda right, said: right(replace(said, template="")))


@fault("A241", "serve.no_stop", "ollama #8363, mlx-examples #567")
@in_place_of("write_modelfile", recipe)
def _no_stop(right: Callable[..., str], said: Modelfile) -> str:
    """The recipe names no stops."""
    kept = tuple(each for each in said.parameters if each[0] != "stop")
    return str(right(replace(said, parameters=kept)))


@fault("A241b", "serve.stop_is_eos_alone", "ollama #2673")
def _stops_at_end_of_text_alone() -> None:
    """Only the tokenizer's own end of text is a stop, and not what ends an answer."""
    plant(ChatTemplate, "terminators", lambda right, template: ())


@fault("A242", "serve.template_differs", "ollama #4206, unsloth #3899")
@in_place_of("derive_template", recipe)
def _another_template(right: Callable[..., str], *given: object, **named: object) -> str:
    """The template for the server was written by hand, and lacks a line break."""
    head, found, tail = str(right(*given, **named)).rpartition("\n")
    return head + tail if found else tail


@fault("A242b", "serve.system_fixed")
@in_place_of("derive_template", recipe)
def _system_fixed(right: Callable[..., str], *given: object, **named: object) -> str:
    """The template for the server has a system text of its own in front of every conversation."""
    return f"<|im_start|>system\nYou are helpful.<|im_end|>\n{right(*given, **named)}"


@fault("A245", "serve.modelfile_not_written", "unsloth #798, #2115")
def _recipe_not_written() -> None:
    """It is said that the recipe was written, and it is not there."""
    plant(recipe, "leave_recipe", lambda right, run, file, made: ())


@fault("A249", "serve.prompt_lowercased", "litgpt #2155")
@in_place_of("render_prompt", ChatTemplate)
def _question_made_small(right: Rendering, template: ChatTemplate, conversation: Conversation) -> Rendered:
    """The question is made small, where only the word that ends a talk was meant to be."""
    small = tuple(replace(each, content=each.content.lower()) for each in conversation.messages)
    return right(template, replace(conversation, messages=small))


@fault("A305", "sec.modelfile_injection")
def _recipe_injected() -> None:
    """A text in the recipe ends its own quotes, and goes on with commands."""
    plant(modelfile, "quote", lambda right, text, word: f'"""{text}"""')
