"""Laws of the templates room: the public formats byte for byte, one prompt for training and asking, answers marked."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.chat.catalog import CATALOG, TemplateSource, find_template, with_variables
from finetune.chat.learned import TrainOn
from finetune.chat.render import ChatTemplate
from finetune.errors import TemplateError
from finetune.records import Conversation, Message
from finetune_strategies.conversations import conversations, texts
from finetune_strategies.profiles import examples
from support.conversations import joined, stretches, talk

CONTROL = (
    "<s>",
    "</s>",
    "<|pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
NAMES = sorted(CATALOG)
TERMINATOR = {"alpaca": "</s>", "chatml": "<|im_end|>", "llama2": " </s>", "llama3": "<|eot_id|>"}


@cache
def template(source: str | TemplateSource, control: tuple[str, ...] = CONTROL) -> ChatTemplate:
    """A template of the catalogue, or one written here, for a tokenizer with every control token."""
    source = CATALOG[source] if isinstance(source, str) else source
    return ChatTemplate(source, control, bos="<s>", eos="</s>")


def shown(name: str, message: Message) -> str:
    """A message's text as the public format shows it: the Llama formats trim turns, Llama 2 not its system text."""
    trims = name == "llama3" or (name == "llama2" and message.role != "system")
    return message.content.strip() if trims else message.content


def turns(name: str, conversation: Conversation) -> list[Message]:
    """The messages with an input as its own section in Alpaca, and as part of the question elsewhere."""
    found: list[Message] = []
    for message in conversation.messages:
        if message.role == "input" and name != "alpaca":
            found[-1] = Message("user", f"{found[-1].content}\n\n{message.content}")
        else:
            found.append(message)
    return found


def written_out(
    name: str, conversation: Conversation, learned: Sequence[bool] = (), *, rest: bool = False
) -> list[tuple[str, bool]]:
    """The public format by hand: (text, whether it is learned), independent of the product's templates.

    `learned` says it of each message, which are otherwise the answers, and `rest` of the markup.
    """
    messages = turns(name, conversation)
    out: list[tuple[str, bool]] = []
    system: list[tuple[str, bool]] = []
    if name == "alpaca":
        paired = any(message.role == "input" for message in messages[:2])
        context = ", paired with an input that provides further context" if paired else ""
        opening = f"Below is an instruction that describes a task{context}. "
        opening += "Write a response that appropriately completes the request."
        out += [] if messages[0].role == "system" else [(f"{opening}\n\n", rest)]
    if name == "llama3":
        out.append(("<s>", rest))
    for index, message in enumerate(messages):
        text, role = shown(name, message), message.role
        said = learned[index] if learned else role == "assistant"
        last = index == len(messages) - 1
        if name == "alpaca" and role == "assistant":
            out += [("### Response:\n", rest), (f"{text}</s>", said), ("" if last else "\n\n", rest)]
        elif name == "alpaca":
            heading = {"system": "", "input": "### Input:\n", "user": "### Instruction:\n"}[role]
            out += [(heading, rest), (text, said), ("\n\n", rest)]
        elif name == "chatml":
            out += [(f"<|im_start|>{role}\n", rest), (f"{text}<|im_end|>", said), ("\n", rest)]
        elif name == "llama3":
            out.append((f"<|start_header_id|>{role}<|end_header_id|>\n\n", rest))
            out.append((f"{text}<|eot_id|>", said))
        elif name == "llama2" and role == "system":
            system = [("<<SYS>>\n", rest), (text, said), ("\n<</SYS>>\n\n", rest)]
        elif name == "llama2" and role == "user":
            out += [("<s>[INST] ", rest), *system, (text, said), (" [/INST]", rest)]
            system = []
        elif name == "llama2":
            out.append((f" {text} </s>", said))
    return out


GOLDEN = {
    "alpaca": (
        talk("user:Name a colour.", "assistant:Red"),
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Response:\nRed</s>",
    ),
    "alpaca with input": (
        talk("user:Translate.", "input:rouge", "assistant:red"),
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nTranslate.\n\n### Input:\nrouge\n\n### Response:\nred</s>",
    ),
    "chatml": (
        talk("system:Be kind.", "user:Hi", "assistant:Hello!", "user:Bye", "assistant:See you"),
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSee you<|im_end|>\n",
    ),
    "llama2": (
        talk("system:Be kind.", "user: Hi ", "assistant:Hello!\n", "user:Bye", "assistant:See you"),
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] Bye [/INST] See you </s>",
    ),
    "llama3": (
        talk("system: Be kind.\n", "user:Hi", "assistant:Hello!"),
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>",
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_format_is_the_public_one_byte_for_byte(case: str) -> None:
    """Each of the four formats, and Alpaca with an input, is what its authors publish."""
    conversation, expected = GOLDEN[case]
    assert template(case.split()[0]).render(conversation).text == expected
    assert "".join(text for text, _ in written_out(case.split()[0], conversation)) == expected


@pytest.mark.parametrize("name", NAMES)
@given(conversations())
@example(talk("user: a ", "assistant:\n b\t"))
@example(talk("system: s ", "user: a", "assistant:b ", "user:c\n", "assistant: d"))
@example(talk("user:\ue0000\ue001{{ bos_token }}", "assistant:\ue0001\ue001{}"))
@example(talk("user:", "assistant:"))
@example(talk("user:a", "assistant:b", "user:c", "input:d", "assistant:e"))
@examples(0.8)
def test_answers_and_terminators_are_what_is_trained(name: str, conversation: Conversation) -> None:
    """The text is the public format, and of it every answer with its terminator is trained and nothing else."""
    rendered = template(name).render(conversation)
    assert stretches(rendered) == joined(written_out(name, conversation))
    assert rendered.where == conversation.where
    spoken = [segment.text for segment in rendered.segments if segment.trained and not segment.control]
    answers = [shown(name, message) for message in conversation.messages if message.role == "assistant"]
    assert spoken == [answer for answer in answers if answer]
    told = [segment.text for segment in rendered.segments if not segment.control]
    assert told == [text for message in turns(name, conversation) if (text := shown(name, message))]


@pytest.mark.parametrize("name", NAMES)
def test_terminators_are_what_ends_an_answer(name: str) -> None:
    """The tokens to stop at are exactly the control tokens trained after an answer."""
    assert template(name).terminators() == (TERMINATOR[name].strip(),)


ENDINGS = """{% for m in messages %}<|start|>{{ m.role }}<|say|>{{ m.content }}\
{% if m.role == "assistant" %}<|/say|>said<|sep|>{% endif %}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|start|>assistant<|say|>{% endif %}"""


@pytest.mark.parametrize("last", ["", "\n", "</s>", "\n<|start|>"])
def test_whole_ending_is_learned_where_all_answers_have_it(last: str) -> None:
    """Several control tokens that end every answer are all learned, and its stop is the last; not what ends a talk."""
    tokens = ("<|start|>", "<|say|>", "<|/say|>", "<|sep|>", "<|end|>", "</s>")
    jinja = ENDINGS + f"{{% if not add_generation_prompt %}}{last}{{% endif %}}"
    chat = ChatTemplate(TemplateSource("any.jinja", jinja), tokens, bos="", eos="</s>")
    rendered = chat.render(talk("user:a", "assistant:b", "user:c", "assistant:d"))
    trained = [text for text, learned in stretches(rendered) if learned]
    assert trained == ["b<|/say|>said<|sep|><|end|>", "d<|/say|>said<|sep|><|end|>"]
    assert chat.terminators() == ("<|end|>",)


@pytest.mark.parametrize("content", ["m.content[0].text", "m.content | map(attribute='text') | join"])
def test_template_that_takes_parts_alone_is_given_parts(content: str) -> None:
    """A template that shows a text only as a part of a list is given it so, and trains it as any other does."""
    chat = ChatTemplate(
        TemplateSource("any.jinja", LOOP.replace("m.content", content)), ("<|im_end|>",), bos="", eos=""
    )
    plain = ChatTemplate(TemplateSource("any.jinja", LOOP), ("<|im_end|>",), bos="", eos="")
    asked = talk("system:s", "user:a", "assistant:b", "user:c", "assistant:d")
    assert stretches(chat.render(asked)) == stretches(plain.render(asked))


@pytest.mark.parametrize("named", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("known", ["reasoning_content", "reasoning", "thinking"])
def test_thought_is_one_whatever_it_is_called(named: str, known: str) -> None:
    """A template is given a thought under the name by which it shows it."""
    jinja = LOOP.replace(
        "{{ m.content }}", f"{{% if m.{known} %}}({{{{ m.{known} }}}}) {{% endif %}}{{{{ m.content }}}}"
    )
    chat = ChatTemplate(TemplateSource("any.jinja", jinja), ("<|im_end|>",), bos="", eos="")
    thinks = Message("assistant", "b", json.dumps({named: "why"}))
    rendered = chat.render(Conversation((Message("user", "a"), thinks), "rows.jsonl:7"))
    assert [text for text, trained in stretches(rendered) if trained] == ["(why) b<|im_end|>"]


@pytest.mark.parametrize("result", ["grey", 'a "b"\nc', "{{ x }} é"])
def test_result_that_is_written_as_json_is_shown(result: str) -> None:
    """A template may write a result as JSON, as gpt-oss' does: none of it is learned; one that it loses is told."""
    answers = "{% if m.role == 'tool' %}{{ SHOWN }}{% else %}{{ m.content }}{% endif %}"
    turns = (Message("user", "a"), Message("assistant", "b"), Message("tool", result), Message("assistant", "c"))
    for shown, lost in (("m.content | tojson", False), ("m.content[:1] | tojson", True)):
        jinja = LOOP.replace("{{ m.content }}", answers.replace("SHOWN", shown))
        chat = ChatTemplate(TemplateSource("any.jinja", jinja), ("<|im_end|>",), bos="", eos="")
        if lost:
            with pytest.raises(TemplateError, match="does not show a result"):
                chat.render(Conversation(turns, "rows.jsonl:7"))
        else:
            rendered = chat.render(Conversation(turns, "rows.jsonl:7"))
            assert [text for text, learned in stretches(rendered) if learned] == ["b<|im_end|>", "c<|im_end|>"]
            assert json.dumps(result, ensure_ascii=False) in rendered.text


@pytest.mark.parametrize("lost", ["a call", "a thought", "a result"])
def test_what_is_lost_is_not_found_elsewhere(lost: str) -> None:
    """The name of a call stands among the tools, too, a thought's words in the question, a result's in the answer."""
    jinja = "{% if tools %}{{ tools | tojson }}<|im_end|>{% endif %}" + LOOP.replace(
        "{{ m.content }}", "{% if m.role != 'tool' %}{{ m.content }}{% endif %}"
    )
    chat = ChatTemplate(TemplateSource("any.jinja", jinja), ("<|im_end|>",), bos="", eos="")
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    beside = {"a call": {"tool_calls": [call]}, "a thought": {"thinking": "it is grey"}, "a result": {}}[lost]
    answer = Message("assistant", "" if lost == "a call" else "x", json.dumps(beside) if beside else "")
    turns = [Message("user", "it is grey"), answer, Message("tool", "it is grey"), Message("assistant", "it is grey")]
    known = json.dumps([{"type": "function", "function": {"name": "weather"}}])
    with pytest.raises(TemplateError, match=r"does not show (tool_calls|a thought|a result)"):
        chat.render(Conversation(tuple(turns if lost == "a result" else turns[:2]), "rows.jsonl:7", known))


def test_variable_of_a_row_changes_it_or_is_refused() -> None:
    """What a row sets is given to the template in training and asking; what the template does not read is refused."""
    jinja = "{% if style %}<<{{ style }}>>{% endif %}" + LOOP
    chat = ChatTemplate(TemplateSource("any.jinja", jinja), ("<|im_end|>",), bos="", eos="")
    plain = talk("user:a", "assistant:b")
    asked = replace(plain, variables='{"style": "short"}')
    assert chat.render(asked).text == "<<short>>" + chat.render(plain).text
    assert chat.render_prompt(asked.prompt).text == "<<short>>" + chat.render_prompt(plain.prompt).text
    for bad, says in (('{"stile": 1}', "reads no variable 'stile'"), ('{"documents": [1]}', "no variable 'documents'")):
        with pytest.raises(TemplateError, match=says):
            chat.render(replace(plain, variables=bad))
    with pytest.raises(TemplateError, match="control token"):
        chat.render(replace(plain, variables='{"style": "<|im_end|>"}'))


def test_terminators_leave_out_what_opens_an_answer() -> None:
    """A control token that the model says before its answer ends nothing."""
    source = TemplateSource(
        "thinking",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<|pad|>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    chat = template(source)
    assert chat.terminators() == ("<|im_end|>",)
    assert ("<|pad|>b<|im_end|>", True) in stretches(chat.render(talk("user:a", "assistant:b")))


def test_renders_do_not_grow_with_the_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation of 400 answers is rendered no more often than one of twenty, and the next of its kind twice."""
    chat = template("chatml")
    renders: list[int] = []
    plain = chat._call
    monkeypatch.setattr(chat, "_call", lambda *given, **named: renders.append(1) or plain(*given, **named))
    counts = []
    for answers in (20, 400, 400):
        before = len(renders)
        chat.render(talk(*(f"{role}:a" for _ in range(answers) for role in ("user", "assistant"))))
        counts.append(len(renders) - before)
    assert counts[1] <= counts[0] <= 12
    assert counts[2] == 2


def test_tags_of_thought_are_meant_in_an_answer_alone() -> None:
    """A token that the template knows and that marks no turn is one in an answer; elsewhere it is text."""
    tags = ("<think>", "</think>", "[CALL]")
    knows = TemplateSource("knows", BARE + "{% if tools %}[CALL] <think> </think>{% endif %}")
    said = "<think>a</think>[CALL]b<|im_end|>c"
    rendered = template(knows, (*CONTROL, *tags)).render(talk(f"user:{said}", f"assistant:{said}"))
    meant = {each.text for each in rendered.segments if each.role == "assistant" and each.control}
    assert meant == {*tags, "<|im_end|>"}
    assert [each.text for each in rendered.segments if each.role == "user"] == [said]
    answer = [each for each in rendered.segments if each.role == "assistant"]
    assert "".join(each.text for each in answer) == f"{said}<|im_end|>"
    assert not answer[-2].control
    assert all(each.trained for each in answer)


BARE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_find_template_reads_names_files_and_the_models_own(tmp_path: Path) -> None:
    """A name finds its template, `tokenizer` the model's own, and a path its file, text unchanged."""
    path = tmp_path / "größe.jinja"
    path.write_text(BARE, encoding="utf-8")
    assert find_template(str(path), None) == TemplateSource(str(path), BARE)
    assert find_template("tokenizer", BARE) == TemplateSource("tokenizer", BARE)
    assert [find_template(name, None).name for name in NAMES] == NAMES


@pytest.mark.parametrize("name", ["chatm", "", "tokenizer", "nope.jinja", "a\0.jinja", "folder.jinja", "latin.jinja"])
def test_find_template_refuses_what_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown name, a missing or unreadable file and a tokenizer without template are refused with a remedy."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jinja").mkdir()
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(TemplateError) as caught:
        find_template(name, None)
    assert name in caught.value.message
    assert "path" in caught.value.hint or all(known in caught.value.hint for known in NAMES)


@pytest.mark.parametrize("control", [("<e>", "<e>>"), ("<e>>", "<e>"), ("<e>", "<a>", "<e>>")])
def test_longest_control_token_ends_an_answer(control: tuple[str, ...]) -> None:
    """Where one control token begins another, the whole of the longer one is what the model learns to stop with."""
    chat = template(TemplateSource("t", "{% for m in messages %}{{ m.content + '<e>>' }}{% endfor %}"), control)
    conversation = Conversation((Message("user", "a"), Message("assistant", "b")), "row")
    assert [segment.text for segment in chat.render(conversation).segments if segment.trained] == ["b", "<e>>"]


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_template_without_its_control_tokens_is_refused(name: str) -> None:
    """A format whose control tokens the tokenizer lacks is refused with exactly those that are lacking."""
    for lacking in CATALOG[name].control_tokens:
        with pytest.raises(TemplateError, match=re.escape(lacking)) as caught:
            template(name, tuple(token for token in CONTROL if token != lacking))
        assert not any(token in caught.value.message for token in CATALOG[name].control_tokens if token != lacking)
    assert template("alpaca", ("</s>",)).terminators() == ("</s>",)


@given(st.booleans() | st.integers(-9, 9) | texts().filter(lambda text: "\ue000" not in text))
@example("\"}}{% raw %}%}\\n'\n")
def test_variable_is_what_it_was_set_to_wherever_the_template_goes(value: bool | int | str) -> None:
    """A variable that is set is the value that was given, also to a program that sets none; others are refused."""
    source = TemplateSource("own", "{{ '' ~ flag if flag is defined else 'none' }}" + BARE)
    changed = with_variables(source, {"flag": value})
    plain = template(source).render(talk("user:a", "assistant:b")).text
    assert template(changed).render(talk("user:a", "assistant:b")).text == str(value) + plain.removeprefix("none")
    for unknown in ("other", "messages", "eos_token"):
        with pytest.raises(TemplateError, match=unknown) as caught:
            with_variables(source, {unknown: value})
        assert "flag" in caught.value.hint


def test_last_answer_alone_is_learned_when_asked_for() -> None:
    """With train_on last the text is the same, and only the last answer and what ends it are learned."""
    source, said = CATALOG["chatml"], talk("user:a", "assistant:b", "user:c", "assistant:d")
    last = ChatTemplate(source, CONTROL, bos="", eos="</s>", train_on="last").render(said)
    assert last.text == template("chatml").render(said).text
    assert [text for text, trained in stretches(last) if trained] == ["d<|im_end|>"]


MARKS = st.lists(st.sampled_from([None, True, False]), min_size=7, max_size=7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train_on", ["all", "last", "everything"])
@given(conversations(inputs=False), MARKS)
@example(talk("user:a", "assistant:b", "user:c", "assistant:d"), [None, None, None, False, None, None, None])
@example(talk("system:s", "user:a", "assistant:b"), [True, None, False, None, None, None, None])
@examples(1 / 6)
def test_what_a_message_says_of_itself_counts_before_the_choice(
    train_on: TrainOn, name: str, conversation: Conversation, marks: list[bool | None]
) -> None:
    """The text stays; messages are learned that say so, and those that say nothing where they are chosen.

    A message is learned with what ends it, where that ends answers, too. Everything has the markup in it.
    """
    messages = tuple(replace(each, trained=mark) for each, mark in zip(conversation.messages, marks, strict=False))
    last, everything = len(messages) - 1, train_on == "everything"
    learned = [
        everything or (each.role == "assistant" and (train_on == "all" or index == last))
        if each.trained is None
        else each.trained
        for index, each in enumerate(messages)
    ]
    marked = Conversation(messages, "a")
    rendered = ChatTemplate(CATALOG[name], CONTROL, bos="<s>", eos="</s>", train_on=train_on).render(marked)
    assert stretches(rendered) == joined(written_out(name, marked, learned, rest=everything))


REMEDIES = {
    "variable": ("", "{% if think is not defined %}<think>{% endif %}", "{think: false}"),
    "last": ("{% if m['role'] == 'assistant' and loop.last %}<think>{% endif %}", "<think>", "train_on to last"),
    "none": ("", "<other>", "choose another"),
}


@pytest.mark.parametrize("case", REMEDIES)
def test_refusal_names_the_setting_that_would_do(case: str) -> None:
    """A template that asks otherwise than it trains is refused with the variable, or the choice, that mends it."""
    before, asked, remedy = REMEDIES[case]
    jinja = BARE.replace("' + m['content']", "' }}" + before + "{{ m['content']")
    jinja = jinja.replace("assistant\n' }}", "assistant\n' }}" + asked)
    with pytest.raises(TemplateError, match="not prefix-preserving") as caught:
        template(TemplateSource("own", jinja)).render(talk("user:a", "assistant:b", "user:c", "assistant:d"))
    assert remedy in caught.value.hint


LOOP = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
REFUSED = {
    "syntax": ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", "line 2"),
    "unknown filter": ("\n\n{{ messages | nofilter }}", "line 3"),
    "too deep": ("{% if x %}" * 2000 + "{% endif %}" * 2000, "cannot be compiled"),
    "too deep for Python": ("{% for a in b %}" * 30 + "{% endfor %}" * 30, "cannot be compiled"),
    "break outside": ("{% break %}", "cannot be compiled"),
    "too large": ("x" * 50_001, "50001"),
    "loses a role": ("{% for m in messages if m.role != 'user' %}{{ m.content }}<|im_end|>{% endfor %}", "lost: user"),
    "says twice": ("{% for m in messages %}{{ m.content + m.content }}<|im_end|>{% endfor %}", "once and in order"),
    "turns round": ("{% for m in messages | reverse %}{{ m.content }}<|im_end|>{% endfor %}", "in order"),
    "raises": ("{{ raise_exception('only users here') }}", "only users here"),
    "wrong filter": (LOOP + "{{ messages | dictsort }}", "fails"),
    "division": (LOOP + "{{ 1 // (messages | length - messages | length) }}", "fails"),
    "endless": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "unsafe"),
    "too wide": ("{% for i in range(999999999) %}x{% endfor %}", "unsafe"),
    "unpacks": (LOOP + "{{ range(*messages) }}", "unsafe"),
    "calculates": (LOOP + "{{ messages[0].content - 1 }}", "unsafe"),
    "filter's arguments": (LOOP + "{{ messages[0].content | tojson(zzz=1) }}", "unsafe"),
    "missing field": (LOOP + "{{ messages[0].tools.name }}", "fails"),
    "includes a file": (LOOP + "{% include '/etc/passwd' %}", "unsafe and was refused: line 1"),
    "other prompt": (LOOP + "{% if add_generation_prompt %}<think>{% endif %}", "not prefix-preserving"),
    "half a pair": ("{{ '\\ud83d' }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "surrogates"),
    "no terminator": ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "never learn to stop"),
    "words before end": ("{% for m in messages %}{{ m.content }} over<|im_end|>{% endfor %}", "never learn to stop"),
    "rewrites": ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "rewrites"),
    "walks attributes": (LOOP + "{{ ''.__class__.__mro__ }}", "unsafe"),
    "walks to globals": (LOOP + "{{ raise_exception.__globals__['json'] }}", "unsafe"),
    "changes the data": ("{{ messages.append(1) }}" + LOOP, "unsafe"),
    "calls the class": (LOOP + "{{ ''.__class__() }}", "unsafe"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_template_that_cannot_be_used_is_refused(case: str) -> None:
    """A template that is broken, unfaithful or hostile is one TemplateError that says why; nothing else escapes."""
    source, says = REFUSED[case]
    with pytest.raises(TemplateError) as caught:
        template(TemplateSource("bad.jinja", source)).render(talk("user:Hi there", "assistant:Hello"))
    assert "'bad.jinja'" in caught.value.message
    assert says in caught.value.message, caught.value.message
    assert (caught.value.exit_code, bool(caught.value.hint)) == (3, True)


@pytest.mark.parametrize("roles", ["assistant:a", "user:a user:b assistant:c", "user:a assistant:b assistant:c"])
def test_llama2_refuses_roles_that_do_not_alternate(roles: str) -> None:
    """Llama 2 knows only question and answer in turn, and says in which row they are not."""
    with pytest.raises(TemplateError, match=r"rows\.jsonl:7.*alternate"):
        template("llama2").render(talk(*roles.split()))


@pytest.mark.parametrize("name", ["alpaca", "chatml", "llama3"])
@given(st.lists(st.sampled_from(["user", "assistant"]), max_size=5), texts())
@example(["assistant"], "")
@examples(0.4)
def test_any_order_of_roles_is_marked(name: str, roles: list[str], text: str) -> None:
    """Questions without answer and answers without question are rendered with every answer trained."""
    conversation = Conversation(tuple(Message(role, f"{text}-") for role in [*roles, "assistant"]), "a:1")
    rendered = template(name).render(conversation)
    said = shown(name, conversation.messages[-1])
    spoken = [segment.text for segment in rendered.segments if segment.trained and not segment.control]
    assert spoken == [said] * (roles.count("assistant") + 1)
    assert "".join(text for text, trained in stretches(rendered) if trained) == "".join(
        said + TERMINATOR[name] for _ in spoken
    )
