"""Laws of the layouts that public sets have: what asks is asked, what answers is learned, or the row is refused.

In the rows below every text to be learned holds `good` and every text that asks holds `ask`.
"""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.config import parse_assignments
from finetune.data.shape import ShapedRows, shape_rows
from finetune.errors import DataError
from finetune.records import Conversation, Document, Row
from finetune_strategies.profiles import examples
from support.conversations import lines_of

U, A = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "good"}
HUMAN, GPT = {"from": "human", "value": "ask"}, {"from": "gpt", "value": "good"}
TOOLS = [{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}]
CALLS = json.dumps([{"name": "f", "arguments": {"x": "good"}}])
HH = "\n\nHuman: ask 1\n\nAssistant: good 1\n\nHuman: ask 2\n\nAssistant: good 2"
READ: dict[str, dict[str, Any]] = {
    "Dolly": {"instruction": "ask", "context": "ask c", "response": "good", "category": "x"},
    "OpenOrca": {"id": "1", "system_prompt": "s", "question": "ask", "response": "good"},
    "SlimOrca": {"conversations": [{**HUMAN, "weight": 0.0}, {**GPT, "weight": 1.0}]},
    "UltraChat 200k": {"prompt": "ask", "prompt_id": "x", "messages": [U, A]},
    "LIMA": {"conversations": ["ask", "good"], "source": "x"},
    "DailyDialog": {"dialog": ["ask", "good", "ask 2", "good 2"], "act": [1, 2, 1, 2], "emotion": [0, 0, 0, 0]},
    "HH in prompts": {"prompt": f"{HH}\n\nHuman: ask 3\n\nAssistant:", "completion": " good 3"},
    "one turn in a prompt": {"prompt": "Human: ask\n\nAssistant:", "completion": " good"},
    "FLAN": {"inputs": "ask", "targets": "good", "task_source": "x", "task_name": "y"},
    "Natural Instructions": {"task_name": "x", "id": "1", "definition": "ask", "inputs": "ask i", "targets": ["good"]},
    "Natural Questions": {"question": "ask", "answer": ["good", "other"]},
    "WebQuestions": {"url": "x", "question": "ask", "answers": ["good", "other"]},
    "SQuAD": {"title": "t", "context": "ask c", "question": "ask", "answers": {"text": ["good"], "answer_start": [1]}},
    "TriviaQA": {"question": "ask", "answer": {"value": "good", "aliases": ["other"]}, "search_results": {}},
    "NuminaMath": {"source": "x", "problem": "ask", "solution": "good"},
    "MATH": {"problem": "ask", "level": "Level 5", "type": "Algebra", "solution": "good"},
    "MetaMath": {"type": "x", "query": "ask", "original_question": "q", "response": "good"},
    "Magicoder": {"lang": "py", "index": 1, "seed": "x", "problem": "ask", "solution": "good"},
    "Glaive": {
        "system": "You help. -",
        "chat": "USER: ask\n\n\nASSISTANT: good <|endoftext|>\n\n\nFUNCTION RESPONSE: {}\n\n\nASSISTANT: good",
    },
    "xLAM": {"id": 0, "query": "ask", "answers": CALLS, "tools": json.dumps(TOOLS)},
    "Hermes": {"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT], "tools": json.dumps(TOOLS)},
    "Nemotron": {"input": [U], "output": "good", "reasoning": "on", "version": "v1", "system_prompt": "thinking on"},
    "OpenThoughts": {"system": "s", "conversations": [{"from": "user", "value": "ask"}, GPT]},
    "Capybara": {"source": "x", "conversation": [{"input": "ask", "output": "good"}]},
    "Gemini": {
        "systemInstruction": {"role": "system", "parts": [{"text": "ask s"}]},
        "contents": [{"role": "user", "parts": [{"text": "ask"}]}, {"role": "model", "parts": [{"text": "good"}]}],
    },
    "Bedrock": {
        "schemaVersion": "x",
        "system": [{"text": "ask s"}],
        "messages": [{"role": "user", "content": [{"text": "ask"}]}, {"role": "assistant", "content": "good"}],
    },
    "prompts that are objects": {"prompt": {"content": "ask"}, "completion": {"text": "good"}},
    "Aya": {"inputs": "ask", "targets": "good", "language": "x", "language_code": "y"},
}
"""Rows that are read by themselves."""
REFUSED: dict[str, dict[str, Any]] = {
    "HH": {"chosen": HH, "rejected": HH.replace("good 2", "bad")},
    "UltraFeedback": {"prompt": "ask", "chosen": [U, A], "rejected": [U, {**A, "content": "bad"}], "score_chosen": 8.0},
    "Intel's DPO": {"system": "s", "question": "ask", "chosen": "good", "rejected": "bad"},
    "OpenAI's DPO": {
        "input": {"messages": [U], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [A],
        "non_preferred_output": [{**A, "content": "bad"}],
    },
    "UltraChat": {"id": "1", "data": ["ask", "good", "ask 2", "good 2"]},
    "Spider": {"db_id": "d", "query": "good", "question": "ask", "query_toks": ["good"]},
    "MBPP": {"task_id": 1, "text": "ask", "code": "good", "test_list": ["x"]},
    "BillSum": {"text": "ask", "summary": "good", "title": "x"},
    "XSum": {"document": "ask", "summary": "good", "id": "1"},
    "CNN": {"article": "ask", "highlights": "good", "id": "1"},
    "SAMSum": {"id": "1", "dialogue": "A: ask\nB: ask", "summary": "good"},
    "TL;DR": {"prompt": "ask", "label": "good"},
    "CAMEL": {"role_1": "x", "topic": "t", "message_1": "ask", "message_2": "good"},
    "ECQA": {"q_no": "1", "q_text": "ask", "q_ans": "good"},
    "HumanEval": {"task_id": "1", "prompt": "ask", "canonical_solution": "good", "entry_point": "x"},
    "ELI5": {"q_id": "1", "title": "ask", "answers": {"a_id": ["1"], "text": ["good", "other"], "score": [3, 2]}},
    "The Stack": {"content": "good", "lang": "x", "path": "p"},
}
"""Rows that are refused with lines that make rows of them; a line that learns a whole text learns `ask`, too."""
WITHOUT_A_LINE: dict[str, tuple[dict[str, Any], str]] = {
    "CommonsenseQA": (
        {"question": "q", "question_concept": "c", "choices": {"text": ["x"]}, "answerKey": "A"},
        "choices",
    ),
    "ARC": ({"id": "1", "question": "q", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "A"}, "choices"),
    "MedMCQA": ({"question": "q", "opa": "a", "opb": "b", "cop": 1, "exp": "e"}, "opa"),
    "WinoGrande": ({"sentence": "s _", "option1": "a", "option2": "b", "answer": "1"}, "option1"),
    "HellaSwag": ({"ctx": "c", "endings": ["x", "y"], "label": "2"}, "endings"),
    "BoolQ": ({"question": "q", "answer": True, "passage": "p"}, "answer"),
    "SST-2": ({"idx": 0, "sentence": "s", "label": 1}, "label"),
    "HotpotQA": ({"question": "q", "answer": "a", "context": {"title": ["t"], "sentences": [["s"]]}}, "context"),
    "PersonaChat": ({"personality": ["p", "q"], "candidates": ["c", "d"], "history": ["u", "a"]}, "candidates"),
    "Natural Instructions' tasks": ({"Definition": ["d"], "Instances": [{"input": "u", "output": ["a"]}]}, "Instances"),
    "Self-Instruct's seeds": ({"id": "1", "instruction": "q", "instances": [{"input": "i", "output": "o"}]}, "output"),
}
"""Rows that no setting makes rows to learn: each is refused by the name that says why."""


def shaped(row: dict[str, Any], **settings: Any) -> ShapedRows:
    """What a row becomes."""
    return shape_rows([Row(row, "a:1")], **settings)


def good_alone_is_learned(found: ShapedRows, row: dict[str, Any]) -> None:
    """Hold a row to the rule above."""
    [said] = found.examples
    if isinstance(said, Document):
        assert said.text in row.values()
        assert "Human:" not in said.text
        return
    answers = [each.content + each.more for each in said.messages if each.role == "assistant"]
    asked = [each.content for each in said.messages if each.role != "assistant"]
    assert answers
    assert all("good" in each and "ask" not in each for each in answers)
    assert not [each for each in asked if "good" in each]
    assert " ".join(asked).count("ask") >= 1 + ("ask c" in str(row)) + ("ask i" in str(row)) + ("ask s" in str(row))


@pytest.mark.parametrize("name", READ)
def test_public_row_is_read_as_its_authors_mean_it(name: str) -> None:
    """Rows laid out as these public sets are need no setting, and learn the answers alone."""
    assert len(READ) == 28
    good_alone_is_learned(shaped(READ[name]), READ[name])


@pytest.mark.parametrize("name", REFUSED)
def test_public_row_that_is_refused_has_a_line_that_reads_it(name: str) -> None:
    """Rows laid out as these public sets are need a setting, and each one named learns the answers alone."""
    assert len(REFUSED) == 17
    with pytest.raises(DataError) as caught:
        shaped(REFUSED[name])
    lines = lines_of(caught.value.hint)
    assert lines
    for line in lines:
        settings = parse_assignments([line])
        good_alone_is_learned(shaped(REFUSED[name], columns=settings["data.columns"], named=True), REFUSED[name])


@pytest.mark.parametrize("name", WITHOUT_A_LINE)
def test_public_row_that_no_setting_reads_is_refused_by_name(name: str) -> None:
    """Such rows are never trained on without what they are about, and no line names a question as an answer."""
    assert len(WITHOUT_A_LINE) == 11
    row, column = WITHOUT_A_LINE[name]
    with pytest.raises(DataError, match=column) as caught:
        shaped(row)
    assert not [line for line in lines_of(caught.value.hint) if "columns={" in line]


def test_row_that_is_one_message_of_many_is_refused() -> None:
    """Where each row is one message, what users say is not learned as a text unless a line says so."""
    row = {"message_id": "1", "parent_id": None, "text": "ask", "role": "prompter", "labels": {"name": ["spam"]}}
    with pytest.raises(DataError, match="'role' and 'text'") as caught:
        shaped(row)
    [line] = lines_of(caught.value.hint)
    [found] = shaped(row, ignored=parse_assignments([line])["data.ignore_columns"]).examples
    assert isinstance(found, Document)
    with pytest.raises(DataError, match="'role' and 'content'"):
        shaped({"role": "user", "content": "ask"})


def test_text_that_holds_turns_is_told() -> None:
    """A text that names its speakers is learned whole, and that is said with the line that learns the answers alone."""
    found = shaped({"text": HH})
    [line] = lines_of(found.notes[0])
    assert isinstance(found.examples[0], Document)
    good_alone_is_learned(shaped({"text": HH}, columns=parse_assignments([line])["data.columns"]), {"text": HH})


SAID = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs"]), min_size=1, max_size=12).map(str.strip)
TURNS = st.lists(SAID.filter(lambda said: said and ":" not in said and "|" not in said and "#" not in said), min_size=1)
SCRIPTS = {
    "\n\nHuman: {} \n\nAssistant: {}": "HH",
    "### Human: {}### Assistant: {}": "Guanaco",
    "[|Human|] {}\n[|AI|] {}\n": "Baize",
    "USER: {}\n\n\nASSISTANT: {} <|endoftext|>\n\n\n": "Glaive",
    "User: {}\nAssistant: {}\n": "lines",
}


@given(
    st.lists(st.tuples(TURNS.map(" ".join), TURNS.map(" ".join)), min_size=1, max_size=4), st.sampled_from([*SCRIPTS])
)
@example([("a", "b"), ("c", "d")], "### Human: {}### Assistant: {}")
@example([("a", "b"), ("c", "d")], "[|Human|] {}\n[|AI|] {}\n")
@example([("a", "b"), ("c", "d")], "User: {}\nAssistant: {}\n")
@example([("a", "He said. Human or not, Assistant it is")], "\n\nHuman: {} \n\nAssistant: {}")
@examples(1 / 3)
def test_conversation_in_one_text_is_its_turns(pairs: list[tuple[str, str]], script: str) -> None:
    """Whatever is said, a text that names who speaks is these turns when it is mapped to messages."""
    text = "".join(script.format(*pair) for pair in pairs)
    [found] = shaped({"log": text}, columns={"messages": "log"}).examples
    assert isinstance(found, Conversation)
    assert [(each.role, each.content) for each in found.messages] == [
        (role, said) for pair in pairs for role, said in zip(("user", "assistant"), pair, strict=True)
    ]


def test_text_that_only_begins_like_a_turn_is_a_text() -> None:
    """A name at the beginning makes no conversation: there must be an answer, and a text of JSON stays one."""
    for text in ("Human: resources", "Human rights.\n\nAssistant: x", "System: Linux", "### Human: only"):
        [found] = shaped({"prompt": text, "completion": "a"}).examples
        assert isinstance(found, Conversation)
        assert found.messages[0].content == text
        assert not shaped({"text": text}).notes


def test_answer_that_is_no_call_of_its_tools_stays_text() -> None:
    """The text of a list of calls is calls where the row has these tools, and text where it has not."""
    row = {"query": "u", "answers": '[{"name": "John", "age": 3}]', "tools": json.dumps(TOOLS)}
    [found] = shaped(row).examples
    [plain] = shaped({"query": "u", "answers": CALLS}).examples
    assert isinstance(found, Conversation)
    assert isinstance(plain, Conversation)
    assert [each.messages[-1].content for each in (found, plain)] == [row["answers"], CALLS]
