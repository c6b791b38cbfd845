"""Faults of what is left for a server."""

from collections.abc import Callable
from dataclasses import replace

from finetune.chat.render import ChatTemplate
from finetune.records import Conversation, Rendered
from finetune.serve import modelfile, recipe
from finetune.serve.modelfile import Modelfile
from finetune.verify.faults.fault import fault, plant


@fault(
    "A240", "serve.no_template", real="ollama #6821, unsloth #449", what="The recipe for a server names no template."
)
def no_template() -> None:
    """FROM and nothing else."""
    plant(recipe, "write_modelfile", lambda right, said: right(replace(said, template="")))


@fault("A241", "serve.no_stop", real="ollama #8363, mlx-examples #567", what="The recipe names no stops.")
def no_stop() -> None:
    """The model runs on."""

    def write(right: Callable[..., str], said: Modelfile) -> str:
        kept = tuple(each for each in said.parameters if each[0] != "stop")
        return str(right(replace(said, parameters=kept)))

    plant(recipe, "write_modelfile", write)


@fault(
    "A241b",
    "serve.stop_is_eos_alone",
    real="ollama #2673",
    what="Only the tokenizer's own end of text is a stop, and not what ends an answer.",
)
def stops_at_end_of_text_alone() -> None:
    """What the template teaches is not looked at."""
    plant(ChatTemplate, "terminators", lambda right, template: ())


@fault(
    "A242",
    "serve.template_differs",
    real="ollama #4206, unsloth #3899",
    what="The template for the server was written by hand, and lacks a line break.",
)
def another_template() -> None:
    """It was never compared."""

    def derive(right: Callable[..., str], *given: object, **named: object) -> str:
        head, found, tail = str(right(*given, **named)).rpartition("\n")
        return head + tail if found else tail

    plant(recipe, "derive_template", derive)


@fault(
    "A242b",
    "serve.system_fixed",
    real="",
    what="The template for the server has a system text of its own in front of every conversation.",
)
def system_fixed() -> None:
    """As the first example of it had."""

    def derive(right: Callable[..., str], *given: object, **named: object) -> str:
        return f"<|im_start|>system\nYou are helpful.<|im_end|>\n{right(*given, **named)}"

    plant(recipe, "derive_template", derive)


@fault(
    "A245",
    "serve.modelfile_not_written",
    real="unsloth #798, #2115",
    what="It is said that the recipe was written, and it is not there.",
)
def recipe_not_written() -> None:
    """It returns before it writes."""
    plant(recipe, "leave_recipe", lambda right, run, file, made: ())


@fault(
    "A249",
    "serve.prompt_lowercased",
    real="litgpt #2155",
    what="The question is made small, where only the word that ends a talk was meant to be.",
)
def question_made_small() -> None:
    """On its way to the template."""

    def prompt(right: Callable[..., Rendered], template: ChatTemplate, conversation: Conversation) -> Rendered:
        small = tuple(replace(each, content=each.content.lower()) for each in conversation.messages)
        return right(template, replace(conversation, messages=small))

    plant(ChatTemplate, "render_prompt", prompt)


@fault(
    "A305",
    "sec.modelfile_injection",
    real="",
    what="A text in the recipe ends its own quotes, and goes on with commands.",
)
def recipe_injected() -> None:
    """Three quotes around whatever it is."""
    plant(modelfile, "quote", lambda right, text, word: f'"""{text}"""')
