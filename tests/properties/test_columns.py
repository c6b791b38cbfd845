"""Laws of columns: a mapped one is what it says, a common name is known, and each refusal names what mends it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from finetune.cli.app import run
from finetune.config import parse_assignments
from finetune.data.shape import ShapedRows, shape_rows
from finetune.errors import DataError
from finetune.records import Conversation, Row
from finetune_strategies.profiles import examples
from support.conversations import lines_of, said_by

U, A = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}
SAID = ("user", "u", "assistant", "a")
BY_NAME: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "ShareGPT": ({"conversations": [HUMAN, GPT]}, SAID),
    "ShareGPT with a system prompt": ({"conversations": [HUMAN, GPT], "system": "s"}, ("system", "s", *SAID)),
    "conversations of roles": ({"conversations": [U, A], "id": 3}, SAID),
    "conversation": ({"conversation": [{"role": "user", "value": "u"}, {"from": "assistant", "content": "a"}]}, SAID),
    "dialogue": ({"dialogue": [{"role": "User", "text": "u"}, {"role": "bot", "text": "a"}]}, SAID),
    "XTuner": ({"conversation": [{"system": "s", "input": "u", "output": "a"}]}, ("system", "s", *SAID)),
    "Gemini": (
        {"contents": [{"role": "user", "parts": [{"text": "u"}]}, {"role": "model", "parts": [{"text": "a"}]}]},
        SAID,
    ),
    "pairs of human and assistant": ({"conversation": [{"human": "u", "assistant": "a"}] * 2}, SAID * 2),
    "messages as JSON": ({"messages": json.dumps([U, A])}, SAID),
    "an object of lists": ({"conversations": {"from": ["human", "gpt"], "value": ["u", "a"]}}, SAID),
    "messages and a rendered text": ({"conversations": [HUMAN, GPT], "text": "<u>u<a>a"}, SAID),
    "messages and their prompt": ({"messages": [U, A], "prompt": "u", "prompt_id": "x"}, SAID),
    "messages and a system column": ({"messages": [U, A], "system_prompt": "s"}, ("system", "s", *SAID)),
    "the same system prompt twice": (
        {"messages": [{"role": "system", "content": "s"}, U, A], "system": "s"},
        ("system", "s", *SAID),
    ),
    "question and answer": ({"question": "u", "answer": "a"}, SAID),
    "capital letters": ({"Question": "u", "Response": "a"}, SAID),
    "input and output": ({"input": "u", "output": "a", "source": "web"}, SAID),
    "prompt and response": ({"prompt": "u", "response": "a", "system": ""}, SAID),
    "query and answer": ({"query": "u", "answer": "a", "system": "s"}, ("system", "s", *SAID)),
    "messages and a text": ({"prompt": [U], "response": "a"}, SAID),
    "instruction, context and response": (
        {"instruction": "u", "context": "c", "response": "a", "category": "x"},
        ("user", "u", "input", "c", "assistant", "a"),
    ),
    "context, question and answer": (
        {"context": "c", "question": "u", "answer": "a"},
        ("user", "u", "input", "c", "assistant", "a"),
    ),
    "SQuAD": (
        {"context": "c", "question": "u", "title": "t", "answers": {"text": ["a", "b"], "answer_start": [0, 4]}},
        ("user", "u", "input", "c", "assistant", "a"),
    ),
    "alpaca and its text": ({"instruction": "u", "input": "", "output": "a", "text": "Below is u a"}, SAID),
    "alpaca and its prompt": ({"instruction": "u", "input": " ", "output": "a", "prompt": "Below is u"}, SAID),
    "alpaca without an instruction": ({"instruction": "", "input": "u", "output": "a"}, SAID),
    "alpaca with a history": (
        {"instruction": "u", "output": "a", "history": [["p", "b"], ["q", "c"]]},
        ("user", "p", "assistant", "b", "user", "q", "assistant", "c", *SAID),
    ),
    "a history of messages": ({"prompt": "u", "response": "a", "history": json.dumps([U, A])}, SAID * 2),
    "columns of other rows": ({"prompt": "u", "completion": "a", "messages": None, "text": None, "label": None}, SAID),
}


def shaped(*rows: dict[str, Any], **settings: Any) -> ShapedRows:
    """What rows become."""
    return shape_rows([Row(row, f"a:{number}") for number, row in enumerate(rows)], **settings)


@pytest.mark.parametrize("name", BY_NAME)
def test_common_names_are_known(name: str) -> None:
    """Rows of these public spellings mean what their formats' authors mean by them."""
    assert len(BY_NAME) == 29
    row, said = BY_NAME[name]
    [found] = shaped(row).examples
    assert said_by(found) == said


def test_all_spellings_may_be_in_one_file() -> None:
    """A file of rows of all these spellings is read row by row."""
    found = shaped(*(row for row, _ in BY_NAME.values()))
    assert [said_by(each) for each in found.examples] == [said for _, said in BY_NAME.values()]
    assert not found.dropped


def test_calls_and_results_of_sharegpt_are_calls_and_results() -> None:
    """`function_call` is a call of the assistant, `observation` the tool's answer, and the tools may be JSON."""
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    tools = [{"name": "f", "description": "", "parameters": {}}]
    turns = [HUMAN, call, {"from": "observation", "value": "1"}, GPT]
    [found] = shaped({"conversations": turns, "tools": json.dumps(tools)}).examples
    assert isinstance(found, Conversation)
    assert [message.role for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert json.loads(found.messages[1].more) == {"tool_calls": calls, "content": None}
    assert json.loads(found.tools) == tools
    broken = {"conversations": [HUMAN, call | {"value": "f(x=1)"}, GPT]}
    assert list(shaped(broken, {"messages": [U, A]}).dropped_at.values()) == ["a:0 conversations[1]"]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking", "Complex_CoT", "cot"])
def test_column_of_thoughts_is_the_thought_of_its_answer(name: str) -> None:
    """A column of thoughts beside a question and its answer reaches the template as the answer's thought."""
    [found] = shaped({"question": "u", name: "t", "answer": "a"}).examples
    assert isinstance(found, Conversation)
    assert json.loads(found.messages[-1].more) == {"reasoning_content": "t"}


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=8)


@given(NAMES, NAMES, st.booleans())
@example("completion", "prompt", False)
@example("text", "label", True)
@example("id", "it's: {a}", False)
def test_mapped_column_is_what_it_says(asked: str, answered: str, alpaca: bool) -> None:
    """Whatever two columns are called, a mapping makes one the question and the other the answer."""
    assume(asked != answered and not {asked, answered} & {"weight", "train"})
    names = ("instruction", "output") if alpaca else ("prompt", "completion")
    found = shaped({asked: "u", answered: "a", "note": "n"}, columns=dict(zip(names, (asked, answered), strict=True)))
    assert [said_by(each) for each in found.examples] == [SAID]
    assert found.ignored_columns == (() if "note" in (asked, answered) else ("note",))


def test_mapping_may_name_a_part_or_be_of_some_rows() -> None:
    """A mapping may name a system prompt or an input alone; rows without its columns are read by their own names."""
    columns = {"system": "persona"}
    assert [
        said_by(each) for each in shaped({"messages": [U, A], "persona": "p"}, {"text": "t"}, columns=columns).examples
    ] == [
        ("system", "p", *SAID),
        ("text", "t"),
    ]
    [found] = shaped({"question": "u", "passage": "c", "answer": "a"}, columns={"input": "passage"}).examples
    assert said_by(found) == ("user", "u", "input", "c", "assistant", "a")
    for row in ({"q": "u", "a": "a"}, {"text": "t"}):
        with pytest.raises(DataError, match="'questions'"):
            shaped(row, columns={"prompt": "questions", "completion": "a"}, named=True)


def test_row_without_a_mapped_column_is_not_read_by_another() -> None:
    """A training row that lacks a column that is named is refused; a row of another file is read by its own names."""
    columns, other = {"prompt": "prompt", "completion": "chosen"}, {"prompt": "u", "completion": "a"}
    with pytest.raises(DataError, match=r"a:1: data\.columns names 'chosen' the completion"):
        shaped({"prompt": "u", "chosen": "a"}, other, columns=columns, named=True)
    assert [said_by(each) for each in shaped(other, columns=columns).examples] == [SAID]


JUDGED: dict[str, list[dict[str, Any]]] = {
    "KTO": [{"prompt": "u", "completion": "good", "label": True}, {"prompt": "u", "completion": "bad", "label": False}],
    "KTO in a table": [
        {"prompt": "u", "completion": "good", "label": "True"},
        {"prompt": "u", "completion": "bad", "label": "False"},
    ],
    "KTO of messages": [
        {"conversations": [HUMAN, {"from": "gpt", "value": "good"}], "kto_tag": True},
        {"conversations": [HUMAN, {"from": "gpt", "value": "bad"}], "kto_tag": False},
    ],
    "a mark of its own": [
        {"question": "u", "answer": "good", "is_correct": 1},
        {"question": "u", "answer": "bad", "is_correct": 0},
    ],
    "DPO": [{"prompt": "u", "chosen": "good", "rejected": "bad"}],
    "DPO with the prompt inside": [{"chosen": "u good", "rejected": "u bad"}],
    "DPO of messages": [
        {"chosen": [U, {**A, "content": "good"}], "rejected": [U, {**A, "content": "bad"}], "score_chosen": 8.0}
    ],
    "DPO of answers": [{"prompt": [U], "chosen": [{**A, "content": "good"}], "rejected": [{**A, "content": "bad"}]}],
    "DPO of alpaca": [{"instruction": "u", "input": "c", "chosen": "good", "rejected": "bad"}],
    "DPO of ShareGPT": [
        {
            "conversations": [HUMAN],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        }
    ],
    "a mask": [{"messages": [U, {**A, "content": "good"}], "loss_mask": [0, 1]}],
    "labels of texts": [{"text": "good", "label": 1}, {"text": "good too", "label": 0}],
    "names of texts": [{"text": "u good", "label": "good"}],
    "names of sentences": [{"sentence": "u good", "label": "good", "id": "x"}],
    "tools of a text": [{"text": "good", "tools": [{"name": "f"}]}],
    "images": [{"messages": [U, {**A, "content": "good"}], "images": ["a.png"]}],
    "two system prompts": [
        {"messages": [{"role": "system", "content": "s"}, U, {**A, "content": "good"}], "system": "t"}
    ],
    "unknown names": [{"frage": "u", "antwort": "good"}],
    "odd names": [{"my question": "u", "it's: an answer": "good", "no": "x"}],
    "a translation": [{"id": "1", "translation": {"en": "good", "fr": "very good"}}],
    "one unknown text": [{"body": "good"}],
    "unknown messages": [{"log": [U, {**A, "content": "good"}]}],
    "two answers": [{"question": "u", "answer": "good", "response": "good"}],
    "two lists of messages": [{"dialog": [U, {**A, "content": "good"}], "turns": [U, {**A, "content": "good"}]}],
    "a question about a text": [{"text": "c good", "question": "u", "answer": "good"}],
    "a prompt alone": [{"prompt": "good"}],
}
"""Rows that are refused, and that the lines of their refusal make rows to learn."""


@pytest.mark.parametrize("name", JUDGED)
def test_refusal_names_lines_that_work(name: str) -> None:
    """Rows that say what is to be learned, or of which no name is known, are refused; each line named makes them rows.

    What they say is bad is learned in none of them.
    """
    assert len(JUDGED) == 26
    with pytest.raises(DataError) as caught:
        shaped(*JUDGED[name])
    lines = lines_of(caught.value.hint)
    assert lines
    for line in lines:
        settings = parse_assignments([line])
        columns, ignored = settings.get("data.columns"), settings.get("data.ignore_columns") or ()
        found = shaped(*JUDGED[name], columns=columns, ignored=ignored, named=True)
        said = [said_by(each) for each in found.examples]
        assert said
        assert all("good" in words[-1] and "bad" not in words[-1] for words in said)


@pytest.mark.parametrize("name", ["KTO", "DPO of messages", "odd names", "images", "names of texts"])
def test_refusal_of_the_command_names_lines_that_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ft check` refuses such rows with exit code 3, and accepts them with each line that it names, typed as it is."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in JUDGED[name]), encoding="utf-8")
    assert run(["check", "--backend", "reference", "--data", str(path)]) == 3
    lines = lines_of(capsys.readouterr().out)
    assert lines
    for line in lines:
        assert run(["check", "--backend", "reference", "--data", str(path), "--set", line]) == 0, (
            capsys.readouterr().out
        )


BESIDE: dict[str, dict[str, Any]] = {
    "a thought": {"messages": [U, {**A, "reasoning_content": "t"}]},
    "a thought of ShareGPT": {"conversations": [HUMAN, {**GPT, "thinking": "t"}]},
    "a column of thoughts": {"question": "u", "Complex_CoT": "t", "answer": "a"},
    "tools": {"messages": [U, A], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    "calls in a column": {
        "query": "u",
        "answers": '[{"name": "f", "arguments": {}}]',
        "tools": '[{"name": "f", "parameters": {}}]',
    },
    "variables": {"messages": [U, A], "chat_template_kwargs": {"enable_thinking": False}},
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_a_template_cannot_show_is_left_unread_by_the_line_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A thought, or tools, that the shipped model's template has no place for is refused with the line that helps."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(BESIDE[name]), encoding="utf-8")
    assert run(["check", "--backend", "reference", "--data", str(path)]) == 3
    [line] = lines_of(capsys.readouterr().out)
    assert run(["check", "--backend", "reference", "--data", str(path), "--set", line]) == 0, capsys.readouterr().out


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.sampled_from(["label", "kto_tag", "desirable", "liked"]))
@examples(1 / 3)
def test_rows_that_are_labelled_bad_are_never_learned(labels: list[bool], name: str) -> None:
    """Labelled rows are refused by the column's name; mapped, those labelled bad are left out and counted."""
    rows = [{"prompt": "u", "completion": "good" if good else "bad", name: good} for good in labels]
    with pytest.raises(DataError, match=f"'{name}'"):
        shaped(*rows)
    found = shaped(*rows, columns={"train": name}, named=True)
    assert [said_by(each)[-1] for each in found.examples] == ["good"] * sum(labels)
    assert found.dropped.get("weight 0", 0) == len(labels) - sum(labels)


def test_keys_of_messages_that_say_what_is_learned_are_read_or_refused() -> None:
    """`loss` of a message is a mark like `train`; a label or a mask is refused, an image costs the row."""
    [found] = shaped({"messages": [U, {**A, "loss": False}, U, {**A, "loss": True}]}).examples
    assert isinstance(found, Conversation)
    assert [message.trained for message in found.messages] == [None, False, None, True]
    for key in ("label", "loss_mask", "mask"):
        with pytest.raises(DataError, match=f"'{key}' of a message"):
            shaped({"messages": [U, A]}, {"messages": [U, {**A, key: 0}]})
    seen = shaped({"messages": [{**U, "images": ["a.png"]}, A]}, {"messages": [U, {**A, "images": []}]})
    assert (len(seen.examples), sum(seen.dropped.values())) == (1, 1)
    plain = shaped({"messages": [U, {**A, "label": 0}]}, ignored=("messages.label",))
    assert [said_by(each) for each in plain.examples] == [SAID]


def test_rows_that_are_marked_bad_are_refused() -> None:
    """A column that says of a row that it is a bad one refuses it by name; where it says so of none, it is unread."""
    row = {"prompt": "u", "completion": "a"}
    assert shaped({**row, "rejected": False}, {**row, "is_bad": 0}).ignored_columns == ("is_bad", "rejected")
    for name in ("rejected", "is_bad", "flagged"):
        with pytest.raises(DataError, match=f"a:1: '{name}'"):
            shaped({**row, name: False}, {**row, name: True})


def test_scores_are_told() -> None:
    """A column of scores is said to be unread by name, before anything is trained."""
    found = shaped({"prompt": "u", "completion": "a", "score": 0.1, "id": 3})
    assert found.ignored_columns == ("id", "score")
    assert [note for note in found.notes if "'score'" in note] == list(found.notes) != []


def test_rows_of_two_hundred_kinds_are_one_short_error() -> None:
    """However many columns rows have, and however they differ, their refusal can be read."""
    with pytest.raises(DataError) as caught:
        shaped(*({f"column {row} {number}": "x" for number in range(row)} for row in range(200)))
    assert len(str(caught.value)) < 40_000
