"""The chat templates that model families ship, in `chat_templates/`, each with what its tokenizer has."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from finetune.chat.catalog import TemplateSource
from finetune.chat.render import ChatTemplate

FOLDER = Path(__file__).parent / "chat_templates"


@dataclass(frozen=True)
class RealTemplate:
    """One family's template.

    Args:
        name: its file in `chat_templates/`.
        opening: what it puts in front of an answer, after the end of the question.
        ending: what an answer ends with; the model learns to say it.
        control_tokens: the control tokens of the family's tokenizer.
        bos: its begin-of-text token.
        system: what becomes of a system message: `turn`, `folded` into the first question, `refused`, or `lost`.
        trims: whether the template strips questions and answers.
        first: what the model says before each answer, and `thinks` what it says before the last one.
    """

    name: str
    opening: str
    ending: str
    control_tokens: tuple[str, ...] = ()
    bos: str = "<s>"
    system: str = "turn"
    trims: bool = False
    first: str = ""
    thinks: str = ""

    @property
    def eos(self) -> str:
        """The end-of-text token."""
        return "<eos>" if self.name.startswith("gemma") else "</s>"

    @property
    def jinja(self) -> str:
        """The template's text."""
        return (FOLDER / f"{self.name}.jinja").read_text(encoding="utf-8")

    @property
    def compiled(self) -> ChatTemplate:
        """The template for a tokenizer of the family."""
        return _compiled(self)


@cache
def _compiled(real: RealTemplate) -> ChatTemplate:
    words = tuple(dict.fromkeys([real.bos, real.eos, *real.control_tokens]))
    return ChatTemplate(TemplateSource(f"{real.name}.jinja", real.jinja), words, bos=real.bos, eos=real.eos)


_CHATML = ("<|im_start|>", "<|im_end|>")
_LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_LLAMA3_OPENING = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_BEGIN = "<|begin_of_text|>"
_GEMMA = ("<start_of_turn>", "<end_of_turn>")
_COHERE = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>")
_IM, _MODEL = "<|im_start|>assistant\n", "<start_of_turn>model\n"

REAL = {
    real.name: real
    for real in (
        RealTemplate("llama-2", " [/INST]", " </s>", system="folded", trims=True, first=" "),
        RealTemplate("llama-3", _LLAMA3_OPENING, "<|eot_id|>", _LLAMA3, bos=_BEGIN, trims=True),
        RealTemplate("llama-3.1", _LLAMA3_OPENING, "<|eot_id|>", _LLAMA3, bos=_BEGIN, trims=True),
        RealTemplate("llama-3.2", _LLAMA3_OPENING, "<|eot_id|>", _LLAMA3, bos=_BEGIN, trims=True),
        RealTemplate("mistral-v0.1", " [/INST]", "</s>", system="refused"),
        RealTemplate("mistral-v0.3", "[/INST]", "</s>", system="lost", trims=True, first=" "),
        RealTemplate("qwen-2", _IM, "<|im_end|>", _CHATML),
        RealTemplate("qwen-2.5", _IM, "<|im_end|>", _CHATML),
        RealTemplate("qwen-3", _IM, "<|im_end|>", _CHATML, thinks="<think>\n\n</think>\n\n"),
        RealTemplate("chatml", _IM, "<|im_end|>", _CHATML),
        RealTemplate("gemma-2", _MODEL, "<end_of_turn>", _GEMMA, bos="<bos>", system="refused", trims=True),
        RealTemplate("gemma-3", _MODEL, "<end_of_turn>", _GEMMA, bos="<bos>", system="folded", trims=True),
        RealTemplate("phi-3", "<|assistant|>\n", "<|end|>", ("<|user|>", "<|system|>", "<|end|>")),
        RealTemplate("phi-4", "<|im_start|>assistant<|im_sep|>", "<|im_end|>", (*_CHATML, "<|im_sep|>")),
        RealTemplate(
            "deepseek-v3",
            "<｜Assistant｜>",
            "<｜end▁of▁sentence｜>",
            ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
            bos="<｜begin▁of▁sentence｜>",
        ),
        RealTemplate("zephyr", "<|assistant|>\n", "</s>"),
        RealTemplate(
            "command-r",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            _COHERE,
            bos="<BOS_TOKEN>",
            trims=True,
        ),
    )
}
