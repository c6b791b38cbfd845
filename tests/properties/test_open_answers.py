"""Laws of looking at open answers: rows are scored as if alone, copies are found, and a run records its claims."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batches import shared_start
from finetune.data.shipped import NEUTRAL, data_path
from finetune.evidence.open_answers import Matching, copied_share, open_questions, row_losses, says
from finetune.evidence.reopen import compare, reopen
from finetune.records import Batch, TokenizedRow
from finetune.report import build_report
from finetune.report.wording import say_outcome
from finetune.train import fine_tune
from finetune.training.prepare import prepare
from support.workplace import make_model, settings, without_reload_check

WORDS = st.lists(st.sampled_from("abc"), max_size=24)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, rows with long answers, and others that were never trained on; one nearly was."""
    folder = tmp_path_factory.mktemp("open")
    make_model(folder / "model")
    for name, count in (("train", 12), ("valid", 20)):
        rows = [
            {"prompt": f"{name} of {n}", "completion": " ".join(f"{name}{n}{k}" for k in range(9))}
            for n in range(count)
        ]
        if name == "valid":
            rows[0]["prompt"] = "train of 3"
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def loaded(place: Path, **changes: object) -> object:
    """A quick run on them."""
    given_ = {"data__valid": str(place / "valid.jsonl"), "tokens__max_length": 200, **changes}
    return settings(place / "model", place / "train.jsonl", **given_)


def test_run_on_open_answers_records_its_claims(place: Path, tmp_path: Path) -> None:
    """Kind and goal are derived, repeated rows are named, every claim is kept, and the sentence speaks of claims."""
    with without_reload_check():
        folder, record = fine_tune(loaded(place), output=tmp_path / "run")  # type: ignore[arg-type]
    assert record == json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["goal"] == "style"
    assert any("1 of 20 rows stand in the rows trained on: 1 with the same prompt" in note for note in record["notes"])
    assert len(record["claims"]["unseen"]["base"]) == 19
    claims = {each["id"] for each in record["verdicts"] if each["id"].startswith("claim-")}
    assert len(claims) == 6
    assert not any(each["counts"] for each in record["verdicts"] if each["id"].startswith(("loss-", "learning-")))
    assert "claims of the goal style hold" in say_outcome(build_report(record))
    base, tuned = compare(*reopen(folder))
    assert base.open is not None
    assert tuned.open is not None
    # What was saved is float32, and the reference trains in float64.
    assert tuned.open.unseen == pytest.approx(record["claims"]["unseen"]["tuned"], rel=1e-6)


def test_row_is_scored_as_if_it_were_alone(place: Path) -> None:
    """A row's loss is that of a batch of its own, whatever rows were scored with it."""
    from finetune.backends import open_backend

    prepared = prepare(loaded(place))  # type: ignore[arg-type]
    session = open_backend("reference").open(prepared.location, "float32", prepared.encoder.tokenizer.pad_id)
    rows = [*prepared.train.rows, *open_questions(prepared).unseen]
    alone = [session.loss(Batch((row,))) / row.target_count for row in rows]
    assert row_losses(session, rows) == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("turns", [1, 9])
def test_answers_to_one_prompt_are_scored_as_if_each_were_alone(place: Path, turns: int) -> None:
    """Whether a prompt is long enough to be gone through once for all its answers or not, each has its own loss."""
    from finetune.backends import open_backend

    prepared = prepare(loaded(place))  # type: ignore[arg-type]
    session = open_backend("reference").open(prepared.location, "float32", prepared.encoder.tokenizer.pad_id)
    matching = open_questions(prepared).rows
    assert matching is not None
    own, others = ([longer(row, turns) for row in rows] for rows in (matching.own, matching.others))
    matching = Matching(tuple(own), tuple(others))
    assert all(shared_start(group) for group in matching.groups()) == (turns > 1)
    found = matching.look(session)
    assert found.own == pytest.approx(row_losses(session, own), rel=1e-9)
    assert found.others.ravel() == pytest.approx(row_losses(session, others), rel=1e-9)


def longer(row: TokenizedRow, times: int) -> TokenizedRow:
    """The row with its prompt said so many times."""
    start = row.trained.index(True)
    prompt = row.ids[:start] * times
    return TokenizedRow((*prompt, *row.ids[start:]), (False,) * len(prompt) + row.trained[start:], row.where)


@pytest.mark.parametrize("train_on", ["all", "everything"])
def test_matched_rows_differ_in_their_answer_alone(place: Path, train_on: str) -> None:
    """Each row has three others with its prompt, other answers, and targets in the answer only, whatever is learned."""
    prepared = prepare(loaded(place, template__train_on=train_on))  # type: ignore[arg-type]
    asked = open_questions(prepared)
    assert asked.longest < 90 < max(len(row.ids) for row in prepared.training_rows)
    found = asked.rows
    assert found is not None
    assert len(found.others) == 3 * len(found.own) == 3 * 12
    for place_, own in enumerate(found.own):
        start = own.trained.index(True)
        group = [own, *found.others[3 * place_ : 3 * place_ + 3]]
        assert len({row.ids for row in group}) == 4
        assert len({row.ids[:start] for row in group}) == 1
        assert all(row.trained.index(True) == start and all(row.trained[start:]) for row in group)


def test_near_duplicates_are_no_wrong_answers(place: Path, tmp_path: Path) -> None:
    """An answer that says nearly what a row's own says could be as right: it is never held against it."""
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    twins = [{"prompt": f"{row['prompt']} again", "completion": f"{row['completion']} indeed"} for row in rows]
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + twins))
    prepared = prepare(settings(place / "model", path, tokens__max_length=200))
    found = open_questions(prepared).rows
    assert found is not None
    decode = prepared.encoder.tokenizer.decode
    first_words = [decode(row.ids[row.trained.index(True) :]).split()[0] for row in (*found.own, *found.others)]
    count = len(found.own)
    for place_ in range(count):
        assert first_words[place_] not in first_words[count + 3 * place_ : count + 3 * place_ + 3]


@pytest.mark.parametrize("refused", [0, 2])
def test_rows_that_the_template_refuses_are_nowhere(place: Path, tmp_path: Path, refused: int) -> None:
    """Rows that are refused are neither trained on, measured, matched nor asked, and all else is as without them."""
    files = {}
    for name, source in (("train", "train"), ("valid", "valid"), ("retention", "train")):
        files[name] = tmp_path / f"{name}.jsonl"
        turns = [{"role": "user", "content": name * 9}, {"role": "assistant", "content": name * 7, "thinking": "c"}]
        ours = [{"messages": turns}] * refused
        rows = [json.loads(line) for line in (place / f"{source}.jsonl").read_text().splitlines()]
        if name == "retention":
            rows = [{"prompt": "a", "completion": f"{n}"} for n in range(8)]
        files[name].write_text("".join(json.dumps(row) + "\n" for row in [*rows, *ours]))
    data = {"data__valid": str(files["valid"]), "data__retention": str(files["retention"]), "template__name": "chatml"}
    prepared = prepare(settings(place / "model", files["train"], tokens__max_length=200, **data))
    assert (prepared.train.counts.kept, prepared.train.counts.read) == (12, 12 + refused)
    assert len(prepared.unseen) == 19
    assert len(prepared.retention) == 8
    assert len([note for note in prepared.notes if "template refuses" in note]) == (refused > 0)
    questions = open_questions(prepared)
    assert questions.rows is not None
    assert (len(questions.unseen), len(questions.rows.own), len(questions.prompts)) == (19, 12, 8)


@given(WORDS, st.lists(WORDS, max_size=3))
def test_copies_are_those_that_trying_all_runs_finds(text: list[str], known: list[list[str]]) -> None:
    """The longest run of at least eight words that stands in a known text, as a share of the text."""
    lengths = [
        size
        for other in known
        for size in range(8, len(text) + 1)
        for start in range(len(text) - size + 1)
        if any(other[at : at + size] == text[start : start + size] for at in range(len(other) - size + 1))
    ]
    expected = max(lengths, default=0) / len(text) if text else 0.0
    assert copied_share(" ".join(text), [" ".join(other) for other in known]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("The capital is Paris.", "Paris", True),
        ("It is 12.", "twelve|12", True),
        ("It is 120.", "twelve|12", False),
        ("South America, of course", "South America", True),
        ("", "ice", False),
        ("It is nice.", "ice", False),
    ],
)
def test_answer_is_right_when_it_says_the_word(text: str, expected: str, right: bool) -> None:
    """Whole words, any of the wordings, whatever stands around them."""
    assert says(text, expected) is right


def test_neutral_rows_are_questions_and_paragraphs() -> None:
    """Enough of both for a verdict, none twice."""
    rows = [json.loads(line) for line in data_path(NEUTRAL).read_text(encoding="utf-8").splitlines()]
    assert sum("prompt" in row for row in rows) >= 40
    assert sum("text" in row for row in rows) >= 16
    assert len({json.dumps(row) for row in rows}) == len(rows)
