"""Laws of a model that learned to call tools: it is asked as it was trained, in evaluation and in a chat."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.evidence.reopen import compare, reopen
from finetune.train import fine_tune
from support.workplace import make_model, settings, without_reload_check

SYSTEM = "Use tools."
TOOLS: list[dict[str, Any]] = [{"function": {"name": name}} for name in ("add", "take")]


def call(name: str, number: int) -> dict[str, Any]:
    """An answer that calls a tool."""
    function = {"name": name, "arguments": {"x": number}}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def row(*turns: dict[str, Any]) -> dict[str, Any]:
    """A row as it was trained: with the system prompt and the tools."""
    return {"messages": [{"role": "system", "content": SYSTEM}, *turns], "tools": TOOLS}


def user(text: str) -> dict[str, Any]:
    """A question."""
    return {"role": "user", "content": text}


ROWS = [
    row(user("one " * 9), call("add", 1)),
    row(user("two " * 9), call("take", 2)),
    row(user("one " * 9), call("add", 1), {"role": "tool", "content": "6"}, {"role": "assistant", "content": "six"}),
]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has learned its three rows."""
    place = tmp_path_factory.mktemp("calls")
    make_model(place / "model", calls=True)
    data = place / "rows.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in ROWS))
    changes = {
        "template__name": "tokenizer",
        "adapter__kind": "full",
        "adapter__rank": 8,
        "tokens__max_length": 256,
        "training__learning_rate": 0.02,
        "training__epochs": 200.0,
        "evaluation__max_new_tokens": 40,
    }
    with without_reload_check():
        fine_tune(settings(place / "model", data, **changes), output=place / "run")
    return place / "run"


def test_calls_that_were_learned_are_right_answers(learned: Path) -> None:
    """A model that writes each call as its template does answers every question right, when trained and evaluated."""
    told = json.loads((learned / "run.json").read_text())["scores"]["learning"]["tuned"]
    assert [(each["given"], each["right"]) for each in told["answers"]] == [
        ('[CALL]{"name": "add", "arguments": {"x": 1}}', True),
        ('[CALL]{"name": "take", "arguments": {"x": 2}}', True),
        ("six", True),
    ]
    base, tuned = compare(*reopen(learned))
    assert base.learning is not None
    assert tuned.learning is not None
    assert (base.learning.right, tuned.learning.right) == (0, 3)
