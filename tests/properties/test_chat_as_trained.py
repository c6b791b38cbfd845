"""Laws of a model that learned to call tools: it is asked as it was trained, in evaluation and in a chat."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.backends.reference.session import ReferenceSession
from finetune.cli.app import run
from finetune.data.shape import shape_rows
from finetune.evidence.reopen import compare, reopen
from finetune.evidence.saved import prepare_again
from finetune.records import Conversation, Message, Row
from finetune.run.folder import RunFolder
from finetune.train import fine_tune
from support.workplace import make_model, settings, without_reload_check

pytestmark = pytest.mark.tools

SYSTEM = "Use tools."
ONE, TWO = "one" + " one" * 8, "two" + " two" * 8
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
    row(user(ONE), call("add", 1)),
    row(user(TWO), call("take", 2)),
    row(user(ONE), call("add", 1), {"role": "tool", "content": "6"}, {"role": "assistant", "content": "six"}),
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


ADD, TAKE = ('[CALL]{"name": "add", "arguments": {"x": 1}}', '[CALL]{"name": "take", "arguments": {"x": 2}}')
Chat = Callable[..., tuple[list[str], str, list[tuple[int, ...]]]]


class Terminal(io.StringIO):
    """Standard input that somebody types into."""

    def isatty(self) -> bool:
        """It is one."""
        return True


@pytest.fixture
def chat(learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """Has `ft chat` talk: what it prints, what else it says, and the ids of each question.

    Options named `tools` and `messages` are written into a file first.
    """
    generate, asked = ReferenceSession.generate, []

    def listen(self: ReferenceSession, prompts: Any, *given: Any) -> Any:
        asked.extend(map(tuple, prompts))
        return generate(self, prompts, *given)

    monkeypatch.setattr(ReferenceSession, "generate", listen)

    def talk(*words: str, typed: str | None = None, piped: str = "", code: int = 0, **files: Any) -> Any:
        asked.clear()
        monkeypatch.setattr("sys.stdin", io.StringIO(piped) if typed is None else Terminal(typed))
        for name, value in files.items():
            (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
            words += (f"--{name}", str(tmp_path / name))
        assert run(["chat", str(learned), "--max-new-tokens", "40", *words]) == code
        told = capsys.readouterr()
        return told.out.replace("> ", "").splitlines(), told.err, list(asked)

    return talk


@pytest.fixture
def chat_ids(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Has `ft chat` ask one question of a run: what it tells, and the ids of the question, if it came to that."""
    generate, asked = ReferenceSession.generate, []

    def listen(self: ReferenceSession, prompts: Any, *given: Any) -> Any:
        asked.extend(map(tuple, prompts))
        return generate(self, prompts, *given)

    monkeypatch.setattr(ReferenceSession, "generate", listen)

    def ask(place: Path, *words: str) -> tuple[str, tuple[int, ...]]:
        asked.clear()
        capsys.readouterr()
        code = run(["chat", str(place), "--max-new-tokens", "1", *words])
        assert code == (0 if asked else 3)
        return capsys.readouterr().err, asked[0] if asked else ()

    return ask


def ids_of(learned: Path, *turns: dict[str, Any], system: str = SYSTEM, tools: Any = TOOLS) -> tuple[int, ...]:
    """The ids that training has of this prompt."""
    first = [{"role": "system", "content": system}] if system else []
    answered = [*first, *turns, {"role": "assistant", "content": "x"}]
    [conversation] = shape_rows([Row({"messages": answered, "tools": tools}, "a:1")]).examples
    return prepare_again(RunFolder(learned)).encoder.question(conversation).ids  # type: ignore[arg-type]


def test_one_question_is_asked_as_in_training(learned: Path, chat: Chat) -> None:
    """`--prompt` asks with the system prompt and the tools that all rows share, says so, and shows the call."""
    for said, answer, place in ((ONE, ADD, 0), (TWO, TAKE, 1)):
        out, err, asked = chat("--prompt", said)
        assert out == [answer]
        assert asked == [ids_of(learned, user(said))]
        row = prepare_again(RunFolder(learned)).train.rows[place]
        assert row.ids[: len(asked[0])] == asked[0]
    assert "Use tools. (--system changes that)" in err
    assert "add, take (--tools changes that)" in err


def test_question_is_asked_with_what_is_given(learned: Path, chat: Chat) -> None:
    """A system prompt, tools and messages that are given take the place of those of training; '' is none."""
    other = [{"type": "function", "function": {"name": "other"}}]
    asked = chat("--prompt", "q", "--system", "Be kind.", tools=other)[2]
    assert asked == [ids_of(learned, user("q"), system="Be kind.", tools=other)]
    _, err, asked = chat("--prompt", "q", "--system", "", "--tools", "")
    assert asked == [ids_of(learned, user("q"), system="", tools=[])]
    assert "changes that" not in err
    turns = [user("a"), {"role": "assistant", "content": "b"}]
    assert chat("--prompt", "q", messages=turns)[2] == [ids_of(learned, *turns, user("q"))]
    own = [{"role": "system", "content": "Mine."}, *turns]
    assert chat("--prompt", "q", messages=own)[2] == [ids_of(learned, *turns, user("q"), system="Mine.")]


def test_result_of_a_call_is_answered(learned: Path, chat: Chat) -> None:
    """Messages that end with a tool's result are asked as they are; `/tool` gives one in a conversation."""
    turns = ROWS[2]["messages"][1:-1]
    out, _, asked = chat(messages=turns)
    assert (out, asked) == (["six"], [ids_of(learned, *turns)])
    out, _, asked = chat(typed=f"{ONE}\n/tool 6\n")
    assert out[0] == ADD
    # In the history the call is what the model wrote, its control token as that token.
    mark = prepare_again(RunFolder(learned)).encoder.tokenizer.control_id("[CALL]")
    assert asked[1][: len(asked[0]) + 1] == (*asked[0], mark)
    assert out[1] == "six"


def test_piped_questions_stand_alone_and_typed_ones_go_on(learned: Path, chat: Chat) -> None:
    """From a pipe each line is a question of its own; at a terminal the conversation goes on until `/reset`."""
    one, two = user(ONE), user(TWO)
    out, _, asked = chat(piped=f"{ONE}\n{TWO}\n/reset\n\nnever asked\n")
    assert asked == [ids_of(learned, one), ids_of(learned, two), ids_of(learned, user("/reset"))]
    assert out[:2] == [ADD, TAKE]
    out, _, asked = chat(typed=f"{ONE}\n{TWO}\n/reset\n{TWO}\n")
    said = {"role": "assistant", "content": out[0]}
    assert asked == [ids_of(learned, one), ids_of(learned, one, said, two), ids_of(learned, two)]


def test_conversation_survives_a_question_that_cannot_be_asked(learned: Path, chat: Chat) -> None:
    """At a terminal a question that is too long is refused and the conversation goes on; from a pipe it ends with 3."""
    long = "word " * 300
    out, err, asked = chat(typed=f"{ONE}\n{long}\n{TWO}\n")
    assert "tokens, and the model reads 256" in err
    assert len(out) == len(asked) == 2
    assert asked[1] == ids_of(learned, user(ONE), {"role": "assistant", "content": out[0]}, user(TWO))
    assert "tokens, and the model reads 256" in chat(piped=f"{long}\n", code=3)[1]


def test_answers_are_drawn_by_their_seed(chat: Chat) -> None:
    """The same seed draws the same answers, question after question, 0 is a seed, and greedy takes the likeliest."""

    def drawn(*words: str) -> list[str]:
        return chat("--temperature", "30", *words, piped="q\nq\n")[0]

    assert drawn("--seed", "0") == drawn("--seed", "0") != drawn("--seed", "1")
    assert drawn("--seed", "0", "--top-p", "0.000001") == chat(piped="q\nq\n")[0]
    first, told, _ = chat("--temperature", "30", "--prompt", "q")
    seed = next(line.removeprefix("drawn with --seed ") for line in told.splitlines() if line.startswith("drawn"))
    assert drawn("--seed", seed)[0] == first[0]


def test_answer_that_is_cut_off_is_told(chat: Chat) -> None:
    """An answer that has not ended within what it may have is not shown as a whole one."""
    assert "cut off" in chat("--prompt", ONE, "--max-new-tokens", "3")[1]
    assert "cut off" not in chat("--prompt", ONE)[1]


BAD: dict[str, tuple[list[str], dict[str, Any], list[str]]] = {
    "old name": (["--ask", "q"], {}, ["--ask", "--prompt"]),
    "no temperature": (["--temperature", "nan"], {}, ["--temperature nan"]),
    "negative temperature": (["--temperature", "-1"], {}, ["--temperature -1"]),
    "no share": (["--top-p", "0", "--temperature", "1"], {}, ["--top-p 0"]),
    "share of what is not drawn": (["--top-p", "0.5"], {}, ["--top-p 0.5", "--temperature 1"]),
    "negative seed": (["--seed", "-1"], {}, ["--seed"]),
    "tools are no JSON": ([], {"tools": "[{"}, ["tools:1", "broken JSON"]),
    "tools are no list": ([], {"tools": {"name": "f"}}, ["JSON list", "dict"]),
    "a tool without a name": ([], {"tools": [{"name": "f"}, {"type": "function"}]}, ["tools[1]", "name"]),
    "a key twice": ([], {"tools": '[{"name": "f", "name": "g"}]'}, ["'name' is there twice"]),
    "no such file": (["--tools", "none.json"], {}, ["none.json", "No such file"]),
    "a folder": (["--messages", "."], {}, ["a folder, not a file"]),
    "no messages": ([], {"messages": ["q"]}, ["messages[0]", "message object"]),
    "unknown role": ([], {"messages": [{"role": "robot", "content": "a"}]}, ["unknown role 'robot'"]),
    "two system prompts": (
        ["--system", "a"],
        {"messages": [{"role": "system", "content": "b"}]},
        ["--system", "begins with a system prompt"],
    ),
    "two questions": (["--prompt", "a"], {"messages": [user("b")]}, ["--prompt", "ends with a question"]),
    "variables are no JSON": (["--variables", "mood=sad"], {}, ["--variables", "no JSON object", "enable_thinking"]),
    "variables are a list": (["--variables", "[1]"], {}, ["--variables", "no JSON object"]),
    "a variable that is no number": (["--variables", '{"a": NaN}'], {}, ["--variables"]),
    "messages as a variable": (["--variables", '{"messages": []}'], {}, ["--variables", "chat_template_kwargs"]),
    "all at once": (["--ask", "q", "--top-p", "7"], {"tools": "x"}, ["--ask", "--top-p 7", "broken JSON"]),
}


@pytest.mark.parametrize("what", BAD)
def test_chat_refuses_bad_options(what: str, chat: Chat) -> None:
    """Whatever is wrong is named, all of it at once, with code 2 and before anything is asked."""
    words, files, named = BAD[what]
    out, err, asked = chat(*words, code=2, **files)
    assert (out, asked) == ([], [])
    assert [word for word in named if word not in err] == []


def test_run_whose_rows_differ_is_asked_without_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where rows share no system prompt none is made up; tools that the template shows not are refused unloaded."""
    make_model(tmp_path / "model")
    rows = [{"messages": [*first, user("q"), {"role": "assistant", "content": "a"}]} for first in SYSTEMS]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in rows))
    with without_reload_check():
        fine_tune(settings(tmp_path / "model", data, training__max_steps=1), output=tmp_path / "run")
    asked = ["chat", str(tmp_path / "run"), "--max-new-tokens", "1", "--prompt", "q"]
    assert run(asked) == 0
    assert "2 training rows have a system prompt, in 2 wordings: --system gives one" in capsys.readouterr().err
    monkeypatch.setattr("finetune.evidence.talk.open_tuned", None)
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    assert run([*asked, "--tools", str(tmp_path / "tools.json")]) == 3
    assert "template 'chatml' does not show tools" in capsys.readouterr().err


MOODS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'user' and mood %}"
    "{{ mood ~ level ~ ' ' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GLAD = ({"mood": "glad", "level": 2}, {"level": 2, "mood": "glad"})


@pytest.mark.parametrize("given", [GLAD, ({"mood": "glad"}, {"mood": "sad"})], ids=["all the same", "different"])
def test_chat_asks_with_the_variables_that_all_rows_share(
    given: tuple[dict[str, Any], ...], tmp_path: Path, chat_ids: Callable[..., Any]
) -> None:
    """Where all rows have the same `chat_template_kwargs`, a chat is asked with those; others take their place."""
    rows = [
        {"messages": [user(f"q{n}"), {"role": "assistant", "content": "a"}], "chat_template_kwargs": each}
        for n, each in enumerate(given)
    ]
    (tmp_path / "moods.jinja").write_text(MOODS, encoding="utf-8")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in rows))
    changes = {"template__name": str(tmp_path / "moods.jinja"), "training__max_steps": 1}
    with without_reload_check():
        fine_tune(settings(make_model(tmp_path / "model"), data, **changes), output=tmp_path / "run")
    encoder = prepare_again(RunFolder(tmp_path / "run")).encoder
    trained = prepare_again(RunFolder(tmp_path / "run")).train.rows[0].ids

    def asked(variables: str) -> tuple[int, ...]:
        return encoder.prompt_ids(Conversation((Message("user", "q0"),), "here", variables=variables))

    err, ids = chat_ids(tmp_path / "run", "--prompt", "q0")
    if given is GLAD:
        assert ids == asked(json.dumps(GLAD[0])) == trained[: len(ids)]
        assert 'with template variables: {"level": 2, "mood": "glad"} (--variables changes that)' in err
    else:
        assert ids == asked("") != trained[: len(ids)]
        assert "2 training rows have template variables, in 2 wordings: --variables gives one" in err
    err, ids = chat_ids(tmp_path / "run", "--prompt", "q0", "--variables", '{"mood": "sad"}')
    assert (ids, "--variables" in err) == (asked('{"mood": "sad"}'), False)
    assert chat_ids(tmp_path / "run", "--prompt", "q0", "--variables", "")[1] == asked("")
    assert "reads no variable 'other'" in chat_ids(tmp_path / "run", "--prompt", "q0", "--variables", '{"other": 1}')[0]


SYSTEMS: list[list[dict[str, str]]] = [
    [],
    *([{"role": "system", "content": text}] for text in ("Be brief.", "Be kind.")),
]
