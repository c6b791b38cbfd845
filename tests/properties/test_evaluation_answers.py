"""Laws of scoring: an answer is right when it is the expected one, all of it and nothing more."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from finetune.chat.encode import encode_row
from finetune.chat.encoder import Encoder
from finetune.evidence.answers import ask, normalise
from finetune.evidence.answers import score as score_ids
from finetune.records import Conversation, Message, ModelLocation, Question
from finetune_strategies.conversations import texts
from support.conversations import TIGHT, talk
from support.real_templates import REAL
from support.workplace import CALLING_TEMPLATE, calling_tokenizer


@dataclass
class Parrot:
    """A session that gives the answers it was told, as the numbers of characters."""

    answers: list[str]

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[list[int]]:
        """The answers, in the order of the prompts."""
        return [[ord(letter) for letter in self.answers[ids[0]]] for ids in prompts]


def score(expected: str, said: str) -> bool:
    """Whether an answer counts as right."""
    questions = [Question((0,), "?", expected)]
    scores = ask(
        Parrot([said]),  # type: ignore[arg-type]
        questions,
        lambda ids: "".join(map(chr, ids)),
        max_new_tokens=9,
        stop_ids=(),
    )
    assert scores.answers[0].given == said.strip()
    return scores.answers[0].right


@given(texts(), texts())
@example("Oslo", " Oslo Oslo")
@example("12", "123")
@example("Oslo", ", Norway")
def test_answer_that_goes_on_is_wrong(expected: str, more: str) -> None:
    """A model that says the right words and does not stop there has not learned the answer."""
    assume(normalise(expected))
    assume(normalise(expected + more) != normalise(expected))
    assert score(expected, expected)
    assert not score(expected, expected + more)


@given(st.lists(texts(), min_size=1, max_size=5, unique_by=normalise))
def test_answers_are_scored_against_their_own_question(expected: list[str]) -> None:
    """Each answer is held to its own question's: all right in order, and all wrong when each says another's."""
    questions = [Question((number,), f"{number}?", text) for number, text in enumerate(expected)]

    def right(said: list[str]) -> int:
        scores = ask(
            Parrot(said),  # type: ignore[arg-type]
            questions,
            lambda ids: "".join(map(chr, ids)),
            max_new_tokens=9,
            stop_ids=(),
        )
        return scores.right

    assert right(expected) == len(expected)
    assert right([*expected[1:], expected[0]]) == (1 if len(expected) == 1 else 0)


TOOLS = json.dumps([{"type": "function", "function": {"name": "add", "parameters": {}}}])
CALLS = json.dumps({"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}]})
CALL = Conversation((Message("user", "1 + 1"), Message("assistant", "", CALLS)), "rows.jsonl:7", TOOLS)
RESULT = Conversation((*CALL.messages, Message("tool", "2"), Message("assistant", "Two")), "rows.jsonl:7", TOOLS)
THOUGHT = Conversation(
    (Message("user", "q"), Message("assistant", "Yes", json.dumps({"reasoning_content": "hm"}))), "rows.jsonl:7"
)
SAID = {
    ("qwen-2.5", talk("user:q", "assistant:Yes")): "Yes",
    ("qwen-2.5", CALL): '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>',
    ("qwen-2.5", RESULT): "Two",
    ("qwen-3", talk("user:q", "assistant:Yes")): "<think>\n\n</think>\n\nYes",
    ("qwen-3", THOUGHT): "<think>\nhm\n</think>\n\nYes",
    ("llama-3.1", CALL): '{"name": "add", "parameters": {"x": 1}}',
    ("calling", CALL): '[CALL]{"name": "add", "arguments": {"x": 1}}',
    ("calling", RESULT): "Two",
    ("tight", talk("user:q", "assistant:(:")): "(:",
}
JINJA = {**{name: real.jinja for name, real in REAL.items()}, "calling": CALLING_TEMPLATE, "tight": TIGHT.jinja}


@pytest.mark.parametrize(("name", "conversation"), SAID)
def test_expected_answer_is_what_the_template_has_the_model_say(
    name: str, conversation: Conversation, tmp_path: Path
) -> None:
    """A model that says what it was taught, thoughts and calls as its template writes them, is right and can stop.

    One that leaves out a control token of a call is not.
    """
    folder = calling_tokenizer(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(JINJA[name], encoding="utf-8")
    location = ModelLocation("model", folder, "local")
    encoder = Encoder(location, "tokenizer")
    question = encoder.question(conversation)
    for learned in ("last", "everything"):
        assert Encoder(location, "tokenizer", train_on=learned).question(conversation) == question  # type: ignore[arg-type]
    assert question.expected == SAID[name, conversation]
    row = encode_row(encoder.template.render(conversation), encoder.tokenizer)
    assert row.ids[: len(question.ids)] == question.ids
    asked = len(question.ids)
    *taught, end = (token for token, trained in zip(row.ids[asked:], row.trained[asked:], strict=True) if trained)
    assert end in encoder.stop_ids
    assert tuple(taught) == question.answer
    mark = encoder.tokenizer.control_id("[CALL]")
    for said, right in ((taught, True), ([token for token in taught if token != mark], mark not in taught)):
        [answer] = score_ids([question], [said], encoder.said).answers
        assert answer.right == right
