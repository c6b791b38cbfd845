"""Laws of the data room: every row is kept, dropped and counted, or refused in its place; nothing is lost or leaked."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.data.facts import CAPITALS, KINDS, KNOWN_PER_KIND, Fact, deranged, known_facts, new_facts, small_facts
from finetune.data.read import read_rows
from finetune.data.shape import ShapedRows, shape_of, shape_rows
from finetune.data.shipped import FACTS, REHEARSAL, RETENTION, data_path, shipped_facts
from finetune.data.split import content_key, hold_out
from finetune.errors import DataError
from finetune.records import Conversation, Document, Message, Row
from finetune_strategies.conversations import Example, RowCase, conversations, rows, texts
from finetune_strategies.profiles import examples
from support.conversations import data_file, said_by


@pytest.mark.parametrize("name", ["nope.jsonl", "", "a\0b.jsonl", "a" * 300 + ".jsonl", "nope/nope.json"])
def test_path_that_is_no_file_is_named(name: str, tmp_path: Path) -> None:
    """A missing file, a folder and a name that no file can have are refused with the path and a remedy."""
    path = tmp_path / name
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def as_jsonl(cases: list[RowCase], ascii_only: bool, newline: str) -> bytes:
    """The rows as lines of a file."""
    return "".join(json.dumps(case.values, ensure_ascii=ascii_only) + newline for case in cases).encode()


def shaped_from(content: bytes, suffix: str) -> ShapedRows:
    """What the two readers make of a file."""
    with data_file(content, suffix) as path:
        return shape_rows(read_rows(path))


@given(
    st.lists(rows(), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n  \n"]),
    st.sampled_from(["", "\ufeff"]),
)
def test_rows_become_what_they_say(cases: list[RowCase], ascii_only: bool, newline: str, mark: str) -> None:
    """Every row of every shape becomes its own words in order, or is dropped for its reason and counted."""
    shaped = shaped_from(mark.encode() + as_jsonl(cases, ascii_only, newline), ".jsonl")
    kept = [case for case in cases if not case.dropped]
    assert all(re.fullmatch(r".*data\.jsonl:\d+", found.where) for found in shaped.examples)
    assert [said_by(found) for found in shaped.examples] == [said_by(case.example) for case in kept]
    assert shaped.dropped == Counter(case.dropped for case in cases if case.dropped)
    assert shaped.shapes == Counter(case.shape for case in cases)
    assert len(cases) == len(shaped.examples) + sum(shaped.dropped.values())
    assert shaped.ignored_columns == tuple(sorted({name for case in cases for name in case.ignored}))


BY_HAND = (
    ({"instruction": "i", "output": "o"}, ("user", "i", "assistant", "o")),
    ({"output": "o", "input": None, "instruction": "i", "system": ""}, ("user", "i", "assistant", "o")),
    (
        {"instruction": "i", "input": "n", "output": " o\n", "system": "s"},
        ("system", "s", "user", "i", "input", "n", "assistant", " o\n"),
    ),
    ({"prompt": " p ", "completion": "c"}, ("user", " p ", "assistant", "c")),
    (
        {"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]},
        ("user", "p", "assistant", "c"),
    ),
    (
        {"messages": [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]},
        ("system", "s", "user", "u", "assistant", "a"),
    ),
    ({"text": "\n t"}, ("text", "\n t")),
    ({"instruction": " ", "input": "n", "output": "o", "text": "rendered"}, ("user", "n", "assistant", "o")),
)


def test_rows_of_every_shape_say_what_is_written_by_hand() -> None:
    """The eight ways to write a row mean what their formats' authors mean by them."""
    shaped = shaped_from("\n".join(json.dumps(values) for values, _ in BY_HAND).encode(), ".jsonl")
    assert tuple(said_by(found) for found in shaped.examples) == tuple(said for _, said in BY_HAND)
    assert len(shaped.examples) == 8


def test_columns_nobody_reads_can_be_shown() -> None:
    """A column whose name is half a surrogate pair is reported in characters that can be written."""
    shaped = shaped_from(b'{"text": "a", "\\ud800b": 1}', ".jsonl")
    assert shaped.ignored_columns == ("\\ud800b",)


def test_what_a_message_says_besides_its_text_is_reported() -> None:
    """What is not read of messages is said by name; null is nothing."""
    turns = [
        {"role": "user", "content": "a", "name": "Ann", "mood": None},
        {"role": "assistant", "content": "b", "mood": 0, "tool_calls": []},
    ]
    content = json.dumps({"messages": turns}) + "\n" + json.dumps({"prompt": turns[:1], "completion": turns[1:]})
    shaped = shaped_from(content.encode(), ".jsonl")
    assert len(shaped.examples) == 2
    assert shaped.ignored_columns == (
        "completion.mood",
        "messages.mood",
    )


SAYS: dict[object, bool | None] = {None: None, "": None, 0: False, 1.0: True, "0.0": False, " True ": True}
"""What values of `weight`, and of `train` and `training` say, in JSON and in tables."""
MARKS = st.dictionaries(st.sampled_from(["weight", "train", "training"]), st.sampled_from(list(SAYS)))


@given(st.sampled_from(["system", "user", "assistant", "tool"]), MARKS)
@example("assistant", {"weight": 0, "train": None})
@example("user", {"weight": 1.0})
def test_message_is_learned_as_its_row_says(role: str, marks: dict[str, object]) -> None:
    """`weight`, `train` and `training` say yes, no or nothing; no template is given them; contradictions are refused.

    A weight of 1 is what every answer has: of another message it asks for nothing, as OpenAI's format has it.
    """
    turns = [{"role": role, "content": "a", **marks}, {"role": "assistant", "content": "b"}]
    said = {SAYS[mark] for mark in marks.values()} - {None}
    row = Row({"messages": turns}, "rows.jsonl:1")
    if len(said) > 1:
        with pytest.raises(DataError, match=r"rows\.jsonl:1 messages\[0\]: .* contradict") as caught:
            shape_rows([row])
        assert caught.value.hint
        return
    shaped = shape_rows([row])
    [found] = shaped.examples
    assert isinstance(found, Conversation)
    asked = role == "assistant" or SAYS[marks.get("train")] or SAYS[marks.get("training")]
    expected = next(iter(said), None)
    assert found.messages[0] == Message(role, "a", trained=expected if asked or not expected else None)
    assert shaped.ignored_columns == ()


ROW_TO_WEIGH = rows().filter(lambda case: case.dropped != "weight 0")


@pytest.mark.parametrize("key", ["weight", "train"])
@given(st.lists(st.tuples(ROW_TO_WEIGH, st.sampled_from(list(SAYS))), min_size=1, max_size=5))
@examples(1 / 3)
def test_row_that_weighs_nothing_is_dropped_and_counted(key: str, cases: list[tuple[RowCase, object]]) -> None:
    """A row of any shape whose `weight` is 0 or whose `train` is false is left out and counted; all others stay."""
    values = [{**case.values, "weight": None, "train": None, key: value} for case, value in cases]
    shaped = shape_rows([Row(each, f"a:{at}") for at, each in enumerate(values)])
    left = [case for case, value in cases if SAYS[value] is not False]
    assert [said_by(found) for found in shaped.examples] == [said_by(case.example) for case in left if not case.dropped]
    assert shaped.dropped.get("weight 0", 0) == len(cases) - len(left)
    assert sum(shaped.dropped.values()) + len(shaped.examples) == len(cases)
    assert key not in shaped.ignored_columns


@given(
    st.sampled_from(["weight", "train"]),
    st.floats().filter(lambda value: value not in (0, 1))
    | st.integers(2)
    | st.sampled_from(["-1", "yes", "nan", [1], {}]),
)
@example("weight", 0.5)
@examples(1 / 3)
def test_weight_between_is_refused_wherever_it_stands(key: str, value: object) -> None:
    """Every other weight is refused, all at once, with its value, its place and what can be done instead."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    heavy = [turns[0], {**turns[1], key: value}]
    values = [
        {"text": "t", key: value},
        {"messages": turns},
        {"messages": heavy},
        {"prompt": turns, "completion": heavy},
    ]
    with pytest.raises(DataError) as caught:
        shape_rows([Row(each, f"a:{at}") for at, each in enumerate(values)])
    assert f"a:0, a:2 messages[1], a:3 completion[1]: {key!r} is {str(value)[:60]!r}" in caught.value.message
    assert "a:1" not in caught.value.message
    assert caught.value.hint.count("repeat a row") == 1


@given(st.lists(rows(), min_size=1, max_size=4), st.booleans())
@examples(2 / 3)
def test_rows_one_list_and_one_line_each_are_the_same(cases: list[RowCase], pretty: bool) -> None:
    """A .json list, .json lines and .jsonl lines of the same rows are read as the same examples."""
    document = json.dumps([case.values for case in cases], indent=2 if pretty else None).encode()
    lines = as_jsonl(cases, ascii_only=False, newline="\n")
    expected = [said_by(case.example) for case in cases if not case.dropped]
    for content, suffix in [(document, ".json"), (lines, ".json"), (lines, ".jsonl"), (lines, ".JSONL")]:
        assert [said_by(found) for found in shaped_from(content, suffix).examples] == expected


@given(st.lists(rows(), min_size=1, max_size=8), st.integers(0, 10))
@examples(2 / 3)
def test_rows_remember_their_place_and_limit(cases: list[RowCase], limit: int) -> None:
    """Each row carries file and line, and a limit keeps exactly the first rows; a limit of 0 is 0."""
    with data_file(b"\n" + as_jsonl(cases, ascii_only=True, newline="\n\n"), ".jsonl") as path:
        found = read_rows(path)
        assert found == [Row(case.values, f"{path}:{2 * index + 2}") for index, case in enumerate(cases)]
        assert read_rows(path, limit=limit) == found[:limit]
        assert [shape_of(row) for row in found] == [case.shape for case in cases]


def examples_for_split() -> st.SearchStrategy[list[Example]]:
    """Examples among which many are equal, and some differ only in where one message ends and another begins."""
    words = st.sampled_from(["", "a", "b", "ab", "user", "assistant"])
    few = conversations(max_turns=2, contents=words) | st.builds(Document, words, st.just("rows.jsonl:9"))
    return st.lists(few | st.builds(Document, texts(), st.just("rows.jsonl:9")), max_size=30)


@given(examples_for_split(), st.floats(0, 1, exclude_max=True), st.integers(0, 3), st.randoms(use_true_random=False))
def test_hold_out_is_a_partition_by_content(found: list[Example], fraction: float, seed: int, rng: object) -> None:
    """Nothing held out is trained on, nothing is lost, row order decides nothing, equal rows stay together."""
    train, held = hold_out(found, fraction, seed)
    assert Counter(map(said_by, train)) + Counter(map(said_by, held)) == Counter(map(said_by, found))
    assert not {said_by(one) for one in train} & {said_by(one) for one in held}
    assert [one for one in found if said_by(one) in {said_by(two) for two in train}] == [*train]
    distinct = len({said_by(one) for one in found})
    share = len({said_by(one) for one in held})
    assert abs(share - fraction * distinct) <= 1
    assert (share == 0) == (fraction == 0 or distinct < 2)
    assert distinct == 0 or share < distinct
    shuffled = list(found)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    moved = [replace(one, where="elsewhere:1") for one in shuffled] + found[:1]
    assert {said_by(one) for one in hold_out(moved, fraction, seed)[1]} == {said_by(one) for one in held}


@given(texts(), texts())
@example("", "assistant")
def test_content_key_tells_where_messages_end(left: str, right: str) -> None:
    """Two examples have one key exactly when they say the same, wherever they stood."""
    joined = Conversation((Message("user", left + right), Message("assistant", "")), "a:1")
    apart = Conversation((Message("user", left), Message("assistant", right)), "a:2")
    assert (content_key(joined) == content_key(apart)) == (said_by(joined) == said_by(apart))
    assert content_key(replace(apart, where="b:7")) == content_key(apart)
    assert content_key(Document(left, "x")) != content_key(apart)


HAND_CHECKED = {"France": "Paris", "Norway": "Oslo", "Fiji": "Suva", "Peru": "Lima", "Australia": "Canberra"}


def right_answer(fact: Fact) -> str:
    """The answer worked out from the question's own words, not from the data set's code."""
    numbers = [int(number) for number in re.findall(r"\d+", fact.question)]
    if fact.kind == "geography":
        country = fact.question.removeprefix("What is the capital of ").removesuffix("?")
        assert HAND_CHECKED.get(country, dict(CAPITALS)[country]) == dict(CAPITALS)[country]
        return dict(CAPITALS)[country]
    if fact.kind == "sums":
        assert fact.question == f"What is {numbers[0]} plus {numbers[1]}?"
        return str(sum(numbers))
    assert len(numbers) == 3
    assert numbers[2] - numbers[1] == numbers[1] - numbers[0] > 0
    return str(2 * numbers[2] - numbers[1])


@pytest.mark.parametrize("size", [0, 1, 2, 12, 48, 100, 110, 3_000])
@pytest.mark.parametrize("seed", [0, 1])
def test_facts_are_new_true_and_balanced(size: int, seed: int) -> None:
    """Any number of facts: each question once, none known to the base, every answer right, the kinds even."""
    facts = new_facts(size, seed)
    assert len(facts) == len({fact.question for fact in facts}) == size
    assert not {fact.question for fact in facts} & {fact.question for fact in known_facts()}
    assert all(fact.answer == right_answer(fact) for fact in facts)
    counts = Counter(fact.kind for fact in facts)
    supply = len(CAPITALS) - KNOWN_PER_KIND
    assert counts["geography"] == min(supply, -(-size // 3))
    assert 0 <= counts["sums"] - counts["patterns"] <= 1
    assert facts == new_facts(size, seed)
    if size >= 12:
        assert facts != new_facts(size, 1 - seed)
        assert {fact.kind for fact in facts[: size // 2]} == set(KINDS)


def test_facts_known_ones_are_always_the_same() -> None:
    """36 facts of each kind are known, all true, all from the small range, and no global random state matters."""
    known = known_facts()
    assert Counter(fact.kind for fact in known) == dict.fromkeys(KINDS, 36)
    assert all(fact.answer == right_answer(fact) for fact in known)
    assert set(known) < {fact for kind in KINDS for fact in small_facts(kind)}
    assert known == known_facts()
    assert len(dict(CAPITALS)) == len(CAPITALS) == 72
    assert dict(CAPITALS).items() >= HAND_CHECKED.items()


@given(st.lists(st.sampled_from(["a", "b", "c", "", "a "]), max_size=12) | st.lists(texts(), max_size=8))
@example(["a"])
@example(["a", "a", "b", "b"])
@example(["a", "a", "a", "b", "c"])
def test_deranged_nobody_keeps_an_equal_answer(answers: list[str]) -> None:
    """The same answers, no one in its old place; None exactly when one answer fills more than half."""
    dealt = deranged(answers)
    possible = all(2 * count <= len(answers) for count in Counter(answers).values())
    assert (dealt is not None) == possible
    if dealt is not None:
        assert Counter(dealt) == Counter(answers)
        assert all(new != old for new, old in zip(dealt, answers, strict=True))


def test_shipped_sets_share_no_question(tmp_path: Path) -> None:
    """What is learnt is unknown to the base; what is rehearsed and what is asked for are known and disjoint."""
    sets = shipped_facts()
    questions = {name: {fact.question for fact in facts} for name, facts in sets.items()}
    known = {fact.question for fact in known_facts()}
    assert {name: len(found) for name, found in questions.items()} == {FACTS: 48, REHEARSAL: 72, RETENTION: 36}
    assert [len(facts) for facts in sets.values()] == [48, 72, 36]
    assert not questions[FACTS] & known
    assert not questions[REHEARSAL] & questions[RETENTION]
    assert questions[REHEARSAL] | questions[RETENTION] == known
    assert all(Counter(fact.kind for fact in facts).keys() == set(KINDS) for facts in sets.values())


def test_shipped_sets_unknown_name_is_refused_and_paths_are_left_alone() -> None:
    """A name that no shipped set has is refused with the three that exist; anything else is a path."""
    with pytest.raises(DataError, match="shipped:fact'") as caught:
        data_path("shipped:fact")
    assert all(name in caught.value.hint for name in (FACTS, REHEARSAL, RETENTION))
    assert data_path("some/rows.jsonl") == Path("some/rows.jsonl")
    with pytest.raises(DataError, match="~nosuchuser"):
        data_path("~nosuchuser/rows.jsonl")


@pytest.mark.parametrize(
    ("within", "beside"),
    [
        ({"tool_calls": [{"function": {"name": "f", "arguments": {}}}], "content": None}, {}),
        ({"reasoning_content": "because"}, {}),
        ({"thinking": "because", "function_call": {"name": "f"}}, {}),
        ({}, {"tools": [{"type": "function"}]}),
        ({}, {"tools": '[{"type": "function"}]'}),
    ],
)
def test_answer_that_is_more_than_text_is_kept_whole(within: dict[str, object], beside: dict[str, object]) -> None:
    """A thought, a call and the tools of a row are handed on as they are; nothing is no thought."""
    asked = {"role": "user", "content": "a"}
    # A Parquet file gives every row every key that any of them has.
    plain = {"messages": [asked, {"role": "assistant", "content": "b", **dict.fromkeys(within.keys() - {"content"})}]}
    rich = {"messages": [asked, {"role": "assistant", "content": "b", **within}]}
    shaped = shape_rows([Row(plain | dict.fromkeys(beside), "a:1"), Row(rich | beside, "a:2")])
    assert (shaped.ignored_columns, shaped.dropped) == ((), {})
    first, second = (example for example in shaped.examples if isinstance(example, Conversation))
    assert (first.messages[-1].more, first.tools) == ("", "")
    assert json.loads(second.messages[-1].more or "{}") == within
    assert json.loads(second.tools or "null") == ([{"type": "function"}] if beside else None)


@pytest.mark.parametrize("parts", [["a"], ["a", "", " b\n"], []])
def test_parts_that_are_text_are_one_text(parts: list[str]) -> None:
    """A list of text parts is their text, as servers join it; any other part is refused by its type and row."""
    written = [{"type": "text", "text": part} for part in parts]
    turns = [{"role": "user", "content": written}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]
    rows = [Row({"messages": turns}, "a:1")]
    [read] = shape_rows(rows).examples
    assert isinstance(read, Conversation)
    assert [message.content for message in read.messages] == ["\n".join(parts), "b"]
    seen = [{"role": "user", "content": [*written, {"type": "image_url", "image_url": {}}]}, turns[1]]
    shaped = shape_rows([*rows, Row({"messages": seen}, "a:2")])
    assert (len(shaped.examples), list(shaped.dropped_at.values())) == (1, ["a:2 messages[0]"])
    with pytest.raises(DataError, match=r"a:2.*'image_url'"):
        shape_rows([Row({"messages": seen}, "a:2")])


def test_variables_of_a_row_are_its_own() -> None:
    """`chat_template_kwargs` and `documents` go to the template with the row; what is null is unsaid."""
    base = {"prompt": "q", "completion": "a"}
    rows = [base, base | {"chat_template_kwargs": {"x": True, "y": None}}, base | {"documents": [{"text": "d"}]}]
    shaped = shape_rows([Row(row, f"a:{number}") for number, row in enumerate(rows)])
    found = [json.loads(each.variables or "{}") for each in shaped.examples if isinstance(each, Conversation)]
    assert found == [{}, {"x": True}, {"documents": [{"text": "d"}]}]
    assert shaped.ignored_columns == ()
    assert shape_rows([Row({"text": "a", "documents": []}, "a:1")]).ignored_columns == ("documents",)
    for bad in ("x", [1], {"messages": []}):
        with pytest.raises(DataError, match=r"a:9.*chat_template_kwargs"):
            shape_rows([Row(base | {"chat_template_kwargs": bad}, "a:9")])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"content": "", "name": "bot"}, "empty answer"),
        ({"content": " ", "tool_calls": []}, "empty answer"),
        ({"content": "<think>a</think>b", "reasoning_content": "c"}, "a thought in <think> and one beside it"),
        ({"content": "<think>a</think>b", "thinking": None}, ""),
        ({"content": None, "tool_calls": [{"function": {"name": "f"}}]}, ""),
    ],
)
def test_answer_that_says_nothing_or_thinks_twice_is_dropped(answer: dict[str, object], reason: str) -> None:
    """A row whose answer is empty, whatever it is called, or that has its thought in two places, is counted by that."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", **answer}]
    shaped = shape_rows([Row({"messages": turns}, "a:1")])
    assert (shaped.dropped, len(shaped.examples)) == (({reason: 1}, 0) if reason else ({}, 1))


@pytest.mark.parametrize("tools", ["[", "no list", {"a": 1}, 3, [float("nan")]])
def test_tools_that_are_no_list_are_refused(tools: object) -> None:
    """Tools that are no list, nor the JSON of one, are refused with the row."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=r"a:1"):
        shape_rows([Row({"messages": turns, "tools": tools}, "a:1")])
