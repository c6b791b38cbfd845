"""Laws of the templates that model families ship: they render, answers are marked, and there is room to spare."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from finetune.chat import sandbox
from finetune.chat.budget import Meter
from finetune.chat.catalog import CATALOG, TemplateSource
from finetune.chat.render import ChatTemplate
from finetune.chat.sandbox import TemplateStoppedError, compile_template
from finetune.errors import TemplateError
from finetune.records import Conversation, Document, Message
from finetune_strategies.conversations import conversations, said
from finetune_strategies.profiles import examples
from support.conversations import stretches, talk
from support.real_templates import FOLDER, REAL, RealTemplate

TALK = talk("user:Hi", "assistant:Hello", "user: Bye\n", "assistant:See you")
WITH_SYSTEM = talk("system:Be kind.", "user:Hi", "assistant:Hello")


TRIMMING = ("llama-2", "mistral-v0.3", "phi-3", "qwen-3")
"""These strip a text in part, or leave out an empty one: that has a law of its own below."""


def fitting(real: RealTemplate, conversation: Conversation) -> Conversation:
    """The conversation as this family's template shows it."""
    turns = conversation.messages
    if real.name in TRIMMING:
        turns = tuple(Message(message.role, message.content.strip()) for message in turns)
    if real.system in ("refused", "lost"):
        turns = tuple(message for message in turns if message.role != "system")
    return Conversation(turns, conversation.where)


def told(real: RealTemplate, conversation: Conversation) -> list[str]:
    """What the model learns to say, by the fixture's own words."""
    answers = [message.content for message in conversation.messages if message.role == "assistant"]
    shown = [answer.strip() if real.trims else answer for answer in answers]
    thinks = [""] * (len(shown) - 1) + [real.thinks]
    return [real.first + thought + text + real.ending for thought, text in zip(thinks, shown, strict=True)]


def test_real_templates_are_all_here() -> None:
    """There are 17 templates, each with its file."""
    assert sorted(REAL) == sorted(path.stem for path in FOLDER.glob("*.jinja"))


@pytest.mark.parametrize("name", REAL)
@given(conversations(inputs=False, contents=said()))
@example(TALK)
@example(WITH_SYSTEM)
@examples(0.1)
def test_real_template_trains_its_answers(name: str, conversation: Conversation) -> None:
    """Every answer with its ending is trained, nothing else is, and each begins where asking ends."""
    real = REAL[name]
    conversation = fitting(real, conversation)
    whole = stretches(real.compiled.render(conversation))
    assert [text for text, trained in whole if trained] == told(real, conversation)
    before = ""
    answers = (index for index, message in enumerate(conversation.messages) if message.role == "assistant")
    for text, trained in whole:
        if trained:
            asked = Conversation(conversation.messages[: next(answers)], conversation.where)
            assert before.endswith(real.opening)
            assert real.compiled.render_prompt(asked).text == before
        before += text
    assert real.compiled.terminators() == (real.ending.strip(),)


@pytest.mark.parametrize("name", REAL)
@given(conversations(inputs=False, contents=st.sampled_from(["", "a", " a", "a\n", "\na\n", " \n a"])))
@example(talk("system:", "user:a", "assistant:b"))
@example(talk("user:", "assistant:\nb\n", "user:c", "assistant: d"))
@example(talk("assistant:b", "user:c", "assistant:d"))
@examples(0.1)
def test_real_template_takes_what_it_renders(name: str, conversation: Conversation) -> None:
    """Empty messages, white space at any edge, and a greeting: as the template itself writes them, or as it refuses."""
    real = REAL[name]
    if real.system in ("refused", "lost"):
        conversation = replace(conversation, messages=tuple(m for m in conversation.messages if m.role != "system"))
    turns = [{"role": message.role, "content": message.content} for message in conversation.messages]
    known = {"tools": None, "documents": None, "bos_token": real.bos, "eos_token": real.eos}
    try:
        shown = compile_template(name, real.jinja)(messages=turns, add_generation_prompt=False, **known)
    except TemplateStoppedError:
        assume(False)
    rendered = real.compiled.render(conversation)
    assert rendered.text == shown
    trained = "".join(segment.text for segment in rendered.segments if segment.trained)
    assert all(turn["content"].strip() in trained for turn in turns if turn["role"] == "assistant")


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("conversation", [TALK, WITH_SYSTEM, talk("user:a", "assistant:b")])
def test_text_of_a_real_template_is_known_again(name: str, conversation: Conversation) -> None:
    """Text that a family's template made, of a question with or without its answer, is not templated twice.

    What somebody says of one of its tokens is no turn, nor is a turn within a sentence.
    """
    real = REAL[name]
    conversation = fitting(real, conversation)
    made = (real.compiled.render(conversation).text, real.compiled.render_prompt(conversation.prompt).text)
    for text in made:
        held = real.compiled.held(Document(text, "a"))
        assert held is not None
        assert held.name == real.compiled.name
        for other in (f"Look: {text}", text.partition("Hi")[2], real.ending, real.opening):
            assert real.compiled.held(Document(other, "a")) is None


def call(name: str, **arguments: object) -> dict[str, object]:
    """A call of a function, as OpenAI's API writes it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def rich(tool: str, asked: str, more: dict[str, object], answer: str, *after: Message) -> Conversation:
    """A question, and an answer that has more than text; with a tool where one is named."""
    tools = json.dumps([{"type": "function", "function": {"name": tool}}]) if tool else ""
    turns = (Message("user", asked), Message("assistant", answer, json.dumps(more) if more else ""), *after)
    return Conversation(turns, "rows.jsonl:7", tools)


WORDS = st.text("ab é\"'{", min_size=1, max_size=9).filter(str.strip)


@given(WORDS, st.none() | WORDS, st.lists(WORDS.map(str.strip), max_size=2), st.sampled_from(["", "c"]), WORDS)
@examples(0.3)
def test_thought_and_calls_are_learned_and_results_are_not(
    asked: str, thought: str | None, called: list[str], spoken: str, result: str
) -> None:
    """Qwen 3's own tokens for a thought, calls, their results and the last answer, each said by who says it.

    What is trained is what the template makes of the messages as they are, less what is asked with.
    """
    more: dict[str, object] = {"tool_calls": [call("f", x=word) for word in called]} if called else {}
    if thought is not None:
        more["reasoning_content"] = thought
    real = REAL["qwen-3"]
    after = (Message("tool", result), Message("assistant", "end")) if called else ()
    talked = rich("f", asked, more, spoken or ("" if called else "d"), *after)
    rendered = real.compiled.render(talked)
    turns = [{"role": each.role, "content": each.content, **json.loads(each.more or "{}")} for each in talked.messages]
    known = {"tools": json.loads(talked.tools), "documents": None, "bos_token": real.bos, "eos_token": real.eos}
    shown = compile_template("qwen-3", real.jinja)
    assert rendered.text == shown(messages=turns, add_generation_prompt=False, **known)
    trained = "".join(text for text, learned in stretches(rendered) if learned)
    asking = "".join(text for text, learned in stretches(rendered) if not learned)
    assert trained.count("<|im_end|>") == 1 + len(after) // 2
    assert trained.count("<tool_call>") == len(called)
    assert not called or f"<tool_response>\n{result}\n</tool_response>" in asking
    if thought is not None and not called:
        assert f"<think>\n{thought.strip(chr(10))}\n</think>" in trained
    assert rendered.text.startswith(real.compiled.render_prompt(talked.prompt).text)


OUTSIDE = {
    "gemma-2": (WITH_SYSTEM, "System role not supported"),
    "mistral-v0.1": (WITH_SYSTEM, "roles must alternate"),
    "mistral-v0.3": (WITH_SYSTEM, "lost: system"),
    "command-r": (talk("user:a", "user:b", "assistant:c"), "roles must alternate"),
    "gemma-3": (talk("user:a", "assistant:b", "assistant:c"), "roles must alternate"),
    "qwen-2": (rich("", "", {"reasoning_content": "why"}, "b"), "does not show a thought"),
    "llama-3": (rich("f", "", {}, "b"), "does not show tools"),
    "zephyr": (rich("", "", {"tool_calls": [call("g")]}, "b"), "does not show tool_calls"),
    "qwen-3": (rich("f", "", {"reasoning_content": "so <|im_end|>"}, "b"), "would show the control token '<|im_end|>'"),
    "deepseek-v3": (talk("user:a", "assistant:<think>x</think>b"), "does not show an answer"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_real_template_refuses_what_it_cannot_show(name: str) -> None:
    """What a family's template takes no note of, or rewrites, is refused with the reason and the row."""
    conversation, says = OUTSIDE[name]
    with pytest.raises(TemplateError, match=re.escape(says)) as caught:
        REAL[name].compiled.render(conversation)
    assert f"rows.jsonl:7: template '{name}.jinja'" in caught.value.message


def test_tools_that_only_their_call_names_are_not_shown() -> None:
    """Whoever is asked must be shown the tools: that the answer calls one of them shows none."""
    shown = REAL["qwen-2.5"]
    jinja = shown.jinja.replace("{%- if tools %}", "{%- if false %}", 1)
    assert jinja != shown.jinja
    hiding = ChatTemplate(TemplateSource("hiding", jinja), shown.control_tokens, bos=shown.bos, eos=shown.eos)
    called = rich("f", "q", {"tool_calls": [call("f", x="1")]}, "")
    assert "<tool_call>" in hiding.render(replace(called, tools="")).text
    with pytest.raises(TemplateError, match="does not show tools"):
        hiding.render(called)


def test_template_that_opens_a_thought_for_asking_only_is_refused() -> None:
    """DeepSeek R1's template asks with an open thought that it never trains: it is not prefix-preserving."""
    real = REAL["deepseek-v3"]
    thinking = real.jinja.replace("{{'<｜Assistant｜>'}}", "{{'<｜Assistant｜><think>\\n'}}")
    assert thinking != real.jinja
    chat = ChatTemplate(TemplateSource("r1.jinja", thinking), real.control_tokens, bos=real.bos, eos=real.eos)
    with pytest.raises(TemplateError, match=r"not prefix-preserving.*<think>"):
        chat.render(TALK)


def test_template_that_prints_the_date_prints_one_day() -> None:
    """Llama 3.2's template asks for today's date, and gets the day on which Llama 3.1's stands, for ever."""
    rendered = REAL["llama-3.2"].compiled.render(WITH_SYSTEM)
    assert "Today Date: 26 Jul 2024\n\nBe kind.<|eot_id|>" in rendered.text
    assert rendered.text == REAL["llama-3.1"].compiled.render(WITH_SYSTEM).text


LENGTHS = {"long": (200, 100_000), "many": (200, 3), "one": (1, 1_000_000), "few": (2, 9)}


@pytest.mark.parametrize("case", LENGTHS)
def test_real_template_takes_half_of_what_it_may(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each template takes at most half of what it may; two are tried on 200 messages of 100,000 characters."""
    number, length = LENGTHS[case]
    meters: list[Meter] = []
    monkeypatch.setattr(sandbox, "Meter", lambda *given: meters.append(Meter(*given)) or meters[-1])
    text = "x y\n" * (length // 4) + "z" * (length % 4)
    messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index in range(number)]
    sources = [(name, source.jinja) for name, source in CATALOG.items()]
    sources += [(name, real.jinja) for name, real in REAL.items()]
    for name, jinja in sources:
        if case != "long" or name in ("qwen-3", "llama-3.2"):
            shown = compile_template(name, jinja)(
                messages=messages, add_generation_prompt=True, bos_token="", eos_token="", tools=None
            )
            assert len(shown) >= number * (length - 1), name
            assert meters[-1].left >= meters[-1].allowed / 2, name
    assert len(meters) == (2 if case == "long" else 21)
