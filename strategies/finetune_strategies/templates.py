"""Chat templates that somebody might have written: sound ones with what they must make of a conversation, and broken
ones that nobody can be trained with.

A sound template is drawn as a `TemplateShape` together with a conversation that it takes; the shape writes the Jinja
and, apart from it, the text that the Jinja must come to, with a mark at what the model is to learn to say.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from hypothesis import strategies as st

from finetune.records import Conversation, Message
from finetune_strategies.conversations import conversations
from finetune_strategies.picks import pick

EOS = "</s>"
BOS = "<s>"
END = "<|end|>"
CONTROL_TOKENS = (EOS, BOS, "<|start|>", "<|end|>", "<|stop|>")
"""What the tokenizer of every drawn template has as control tokens."""
Parts = tuple[tuple[str, bool], ...]
"""Stretches of text in order, each with whether the model learns to say it."""


@dataclass(frozen=True)
class TemplateShape:
    """How a chat template writes a conversation.

    Args:
        before: what stands in front of a role's name, and `after` behind it.
        close: what ends a message that is no answer.
        stop: what ends an answer, as the model learns to say it; a control token at its end.
        between: what follows that, and the model does not say.
        assistant: the name of the one who answers.
        system: whether a system text is a turn, is put in front of the first question, or is refused.
        trims: how questions and answers are stripped: not at all, by the filter or by the method.
        says_bos: whether the text begins with the begin-of-text token.
        says_first: what the model says before each answer, beyond what it is asked with.
        style: how the Jinja is written: one expression a message, or text with places in it, closely or on lines.
        finds_first: how the Jinja knows the first question.
    """

    before: str = "<|start|>"
    after: str = "\n"
    close: str = "<|end|>\n"
    stop: str = "<|end|>"
    between: str = "\n"
    assistant: str = "assistant"
    system: Literal["turn", "folded", "refused"] = "turn"
    trims: Literal["", "filter", "method"] = ""
    says_bos: bool = False
    says_first: str = ""
    style: Literal["expression", "close text", "text on lines", "generation tags"] = "expression"
    finds_first: Literal["loop.first", "namespace", "index"] = "loop.first"

    def opening(self, role: str) -> str:
        """What stands in front of a message of this role."""
        return f"{self.before}{self.assistant if role == 'assistant' else role}{self.after}"

    def shown(self, message: Message) -> str:
        """The message's text as the template shows it."""
        return message.content.strip() if self.trims and message.role != "system" else message.content

    def written_out(self, conversation: Conversation) -> Parts:
        """The conversation as the template must render it for training."""
        parts: list[tuple[str, bool]] = [(BOS if self.says_bos else "", False)]
        folded = ""
        for message in conversation.messages:
            text = self.shown(message)
            if message.role == "system" and self.system == "folded":
                folded = f"{text}\n\n"
            elif message.role == "assistant":
                # Every answer has it: where it is no second end, the model says it, too, and stops after it.
                said = END if self.between.startswith(END) and not {EOS, END} & {self.stop.strip()} else ""
                parts += [(self.opening("assistant"), False), (self.says_first + text + self.stop + said, True)]
                parts.append((self.between.removeprefix(said), False))
            else:
                parts.append((f"{self.opening(message.role)}{folded}{text}{self.close}", False))
                folded = ""
        return tuple(part for part in parts if part[0])

    def asked(self, conversation: Conversation) -> str:
        """The prompt for an answer to come after this conversation."""
        return "".join(text for text, _ in self.written_out(conversation)) + self.opening("assistant")


@dataclass(frozen=True)
class TemplateCase:
    """A template in Jinja, a conversation that it takes, and what must become of it; the tokens are module constants.

    `parts` is the text for training; `shape` tells how the template writes any other conversation.
    """

    jinja: str
    conversation: Conversation
    parts: Parts
    shape: TemplateShape


@dataclass(frozen=True)
class BrokenTemplate:
    """A template that renders, but nobody can be trained with; `conversation` shows it, `says` is in the refusal."""

    source: str
    conversation: Conversation
    fault: str
    says: str


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def write_jinja(shape: TemplateShape, *, answers: str = "{}", asks: str | None = None, skips: str = "") -> str:
    """The template in Jinja.

    Args:
        shape: how it writes a conversation.
        answers: the expression for an answer, `{}` being its text.
        asks: what it ends with when it asks, if not with what answers begin with.
        skips: a role whose messages it leaves out.
    """
    open_tag, close_tag = {"expression": ("{%- ", " -%}\n"), "text on lines": ("{% ", " %}\n")}.get(
        shape.style, ("{% ", " %}")
    )

    def tag(code: str) -> str:
        return f"{open_tag}{code}{close_tag}"

    def say(*pieces: str) -> str:
        """Texts, and expressions that begin with `=`."""
        pieces = tuple(piece for piece in pieces if piece)
        if shape.style == "expression":
            code = " + ".join(piece[1:] if piece.startswith("=") else _quoted(piece) for piece in pieces)
            return f"{{{{- {code} -}}}}\n" if pieces else ""
        return "".join(f"{{{{ {piece[1:]} }}}}" if piece.startswith("=") else piece for piece in pieces)

    content = "m['content']" if shape.style == "expression" else "m.content"
    trimmed = {"": content, "filter": f"({content} | trim)", "method": f"{content}.strip()"}[shape.trims]
    stop = (shape.stop.removesuffix(EOS), "=eos_token") if shape.stop.endswith(EOS) else (shape.stop,)
    answer = (shape.says_first, "=" + answers.format(trimmed), *stop)
    marks = ("generation", "endgeneration") if shape.style == "generation tags" else ()
    # What follows a tag on its line is written as an expression: Jinja drops a line break there.
    between = "=" + _quoted(shape.between) if marks and shape.between else shape.between
    spoken = f"{tag(marks[0])}{say(*answer)}{tag(marks[1])}" if marks else ""
    turns = [
        tag(f"if m['role'] == '{skips}'"),
        tag("elif m['role'] == 'system'"),
        say(shape.opening("system"), "=" + content, shape.close) if shape.system == "turn" else tag(_REFUSAL),
        tag("elif m['role'] == 'user'"),
        say(shape.opening("user"), *_folding(shape), "=" + trimmed, shape.close),
        tag("set ns.folded = ''"),
        tag("else"),
        say(shape.opening("assistant")) + spoken + say(between)
        if spoken
        else say(shape.opening("assistant"), *answer, shape.between),
        tag("endif"),
    ]
    prompt = say(shape.opening("assistant") if asks is None else asks)
    return "".join(
        [
            *([say("=bos_token")] if shape.says_bos else []),
            *map(tag, _prelude(shape)),
            tag("for m in turns"),
            *turns,
            tag("endfor"),
            tag("if add_generation_prompt"),
            prompt,
            tag("endif"),
        ]
    )


_REFUSAL = "set ns.x = raise_exception('no system text')"


def _folding(shape: TemplateShape) -> tuple[str, ...]:
    if shape.system != "folded":
        return ()
    if shape.finds_first == "namespace":
        return ("=ns.folded",)
    first = {"loop.first": "loop.first", "index": "loop.index0 == 0"}[shape.finds_first]
    return (f"=(folded if {first} else '')",)


def _prelude(shape: TemplateShape) -> list[str]:
    if shape.system != "folded":
        return ["set turns = messages", "set ns = namespace(folded='')"]
    return [
        "if messages[0].role == 'system'",
        "set folded = messages[0].content + '\\n\\n'",
        "set turns = messages[1:]",
        "else",
        "set folded = ''",
        "set turns = messages",
        "endif",
        "set ns = namespace(folded=folded)",
    ]


@cache
def template_shapes() -> st.SearchStrategy[TemplateShape]:
    """Ways to write a conversation, from which a model can be trained."""
    return st.builds(
        TemplateShape,
        before=st.sampled_from(["<|start|>", "### ", "[", "{'", ""]),
        after=st.sampled_from(["\n", ":\n", "] ", "'}\\n", " "]),
        close=st.sampled_from(["<|end|>\n", "\n\n", "<|end|>", ""]),
        stop=st.sampled_from(["<|end|>", EOS, "<|stop|>", f" {EOS}", "\n<|stop|>"]),
        between=st.sampled_from(["\n", "", "\n\n", "<|end|>\n"]),
        assistant=st.sampled_from(["assistant", "model"]),
        system=st.sampled_from(["turn", "folded", "refused"]),
        trims=st.sampled_from(["", "filter", "method"]),
        says_bos=st.booleans(),
        says_first=st.sampled_from(["", "<think>\n\n</think>\n\n", "<|start|>"]),
        style=st.sampled_from(["expression", "close text", "text on lines", "generation tags"]),
        finds_first=st.sampled_from(["loop.first", "namespace", "index"]),
    )


_CONVERSATIONS = conversations(inputs=False)


@st.composite
def templates_with_conversations(draw: st.DrawFn) -> TemplateCase:
    """A sound template, a conversation of roles that it takes, and the text that it must make of it."""
    shape = draw(template_shapes())
    conversation = draw(_CONVERSATIONS)
    if shape.system == "refused" and conversation.messages[0].role == "system":
        conversation = replace(conversation, messages=conversation.messages[1:])
    return TemplateCase(write_jinja(shape), conversation, shape.written_out(conversation), shape)


FAULTS: Mapping[str, str] = {
    "asks otherwise": "not prefix-preserving",
    "loses questions": "once and in order (lost: ",
    "doubles answers": "once and in order (lost: none)",
    "rewrites answers": "rewrites the text",
    "never ends": "never learn to stop",
    "refuses": "no system text",
}
"""How a template can be unfit for training, and the words of the refusal."""

_PLAIN = conversations(inputs=False, contents=st.sampled_from(["ab", "a b", "abc\n", " ab", "été ab"]))


@st.composite
def broken_templates(draw: st.DrawFn) -> BrokenTemplate:
    """A sound template with one fault planted, and a conversation that shows it."""
    fault = draw(pick(*FAULTS))
    shape = draw(template_shapes())
    conversation = draw(_PLAIN)
    turns = [message for message in conversation.messages if message.role != "system"]
    if fault == "asks otherwise":
        asks = draw(pick(shape.opening("assistant") + "<|start|>?", "?", shape.opening("assistant") + "-"))
        source = write_jinja(shape, asks=asks)
    elif fault == "loses questions":
        source = write_jinja(shape, skips="user")
    elif fault == "doubles answers":
        source = write_jinja(shape, answers=draw(pick("{0} + {0}", "{0} ~ '-' ~ {0}")))
    elif fault == "rewrites answers":
        rewriting = ["{} | upper", "{} | replace('b', 'c')", "{} ~ ('!' if 'b' in {} else '')", "{}.split('b')[0]"]
        source = write_jinja(shape, answers=draw(pick(*rewriting)).replace("{}", "{0}"))
    elif fault == "never ends":
        stop = draw(pick("", ".", " (over)"))
        source = write_jinja(replace(shape, stop=stop, between=f"{stop}\n"))
    else:
        source = write_jinja(replace(shape, system="refused"))
        turns.insert(0, Message("system", draw(pick("", "ab"))))
    takes_system = shape.system != "refused" and fault != "refuses"
    kept = list(conversation.messages) if takes_system else turns
    return BrokenTemplate(source, replace(conversation, messages=tuple(kept)), fault, FAULTS[fault])
