"""Laws of rows that training rows repeat: they are found, word for word or nearly, and never called unseen."""

import json
import math
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config import LoadedConfig
from finetune.data import overlap
from finetune.data.overlap import LIKENESS, find_overlap, near_twins
from finetune.data.shape import Example
from finetune.errors import ConfigError
from finetune.records import Conversation, Document, Message
from finetune.train import fine_tune
from finetune.training.prepare import prepare
from support.workplace import make_model, settings, without_reload_check

WORDS = st.lists(
    st.sampled_from(["the", "a", "sun", "moon", "rose", "rises", "sets", "over", "sea", "hill", "red", "one", "two"]),
    max_size=9,
)
TEXTS = WORDS.map(" ".join)


def talk(prompt: str, answer: str, where: str = "row") -> Conversation:
    """One question and its answer."""
    return Conversation((Message("user", prompt), Message("assistant", answer)), where)


EXAMPLES = st.one_of(st.builds(talk, TEXTS, TEXTS), TEXTS.map(lambda text: Document(text, "row")))


def words_of(text: str) -> set[str]:
    """Its words."""
    return set(re.findall(r"\w+", text))


def text_of(example: Example) -> str:
    """All that a row says."""
    return example.text if isinstance(example, Document) else " ".join(turn.content for turn in example.messages)


@given(st.lists(EXAMPLES, max_size=6), st.lists(EXAMPLES, max_size=12), st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_near_twins_are_those_that_comparing_all_pairs_finds(
    held: list[Example], training: list[Example], limit: float
) -> None:
    """No pair is left out and none is made up: as the plain comparison of every row with every training row."""
    rows = [words_of(text_of(each)) for each in (*held, *training)]

    def weight(words: set[str]) -> int:
        return sum(round(1000 * math.log1p(len(rows) / max(1, sum(word in row for row in rows)))) for word in words)

    def alike(one: set[str], other: set[str]) -> Fraction:
        return Fraction(weight(one & other), weight(one | other) or 1)

    def twins(one: Example, other: Example) -> bool:
        if not words_of(text_of(one)) or alike(words_of(text_of(one)), words_of(text_of(other))) < Fraction(limit):
            return False
        if isinstance(one, Document) or isinstance(other, Document):
            return True
        if any(len(each.answer.split()) > 6 for each in (one, other)):
            return True
        first, second = (words_of(each.messages[0].content) for each in (one, other))
        return one.answer == other.answer and weight(first & second) >= limit * weight(first | second)

    expected = {}
    for place, one in enumerate(held):
        near = [
            (alike(words_of(text_of(one)), words_of(text_of(other))), -at)
            for at, other in enumerate(training)
            if twins(one, other)
        ]
        if near:
            expected[place] = -max(near)[1]
    assert near_twins(held, training, limit) == expected


def test_rows_of_one_pattern_are_no_twins_and_reworded_ones_are() -> None:
    """What all rows share tells none apart; a question that was asked in other words was seen."""
    places = [f"{first}{second}" for first in ("bel", "kor", "mar", "tun") for second in ("a", "in", "ov", "um", "ys")]
    rows = [
        talk(f"What is the capital city of {each}?", f"The capital city of {each} is {each}grad.") for each in places
    ]
    reworded = talk("Name the capital of belin!", "Belingrad is the capital of belin.")
    assert near_twins([*rows[:4], reworded], rows[4:]) == {}
    assert near_twins([reworded], rows) == {0: 1}


def test_scripts_without_spaces_are_compared_sign_by_sign() -> None:
    """A sentence of signs is many words, and a reworded one has most of them."""
    rows = [
        talk("水在多少度结冰?", "水在零度的时候会结成冰。"),
        talk("猫喜欢吃什么?", "多数的猫都喜欢吃鱼和肉。"),
        talk("太阳从哪边升起?", "每天早上太阳都从东方升起。"),
    ]
    assert near_twins(
        [talk("请问猫喜欢吃什么东西?", "猫都喜欢吃肉和鱼。"), talk("月亮有多大?", "比地球小得多。")], rows
    ) == {0: 1}


def test_short_answers_tell_rows_apart() -> None:
    """Numbers shared by two sums make them no twins; the same sum said otherwise does."""
    sums = [
        talk(f"What is {one} plus {two}?", f"{one + two}") for one in range(1, 9) for two in range(1, 9) if one < two
    ]
    held = [talk("What is 3 plus 9?", "12"), talk("What is 5 plus 2?", "7"), talk("So what is 2 plus 5?", "7")]
    assert near_twins(held, sums).keys() == {1, 2}


LONG = "an answer that is much too long to be said twice by chance"
TRAINING: list[Example] = [
    *(talk(f"What does word {n} mean?", f"{LONG} of {n}", f"train:{n}") for n in range(40)),
    *(talk(f"Is text {n} rude?", "no", f"train:{n + 40}") for n in range(20)),
    Document("some plain text about the sea", "train:60"),
]


@pytest.mark.parametrize(
    ("row", "likeness", "where"),
    [
        (talk("What does word 3 mean?", f"{LONG} of 3"), "row", "train:3"),
        (talk("what does  word 3 mean? ", f"{LONG} OF 3\n"), "row", "train:3"),
        (Document("Some plain text  about the sea", "row"), "row", "train:60"),
        (talk("Tell me something entirely else", f"{LONG} of 5"), "answer", "train:5"),
        (talk("What does word 7 mean?", "nothing at all"), "prompt", "train:7"),
        (talk("Say: what does word 9 mean, please?", f"{LONG} of 9, and more"), "near", "train:9"),
        (talk("Is it dark at night?", "no"), None, ""),
        (Document("no word of this", "row"), None, ""),
    ],
)
def test_a_row_that_training_repeats_is_found(row: Example, likeness: str | None, where: str) -> None:
    """Word for word, by a long answer, by its prompt or nearly, with both places; a label is no twin."""
    found = find_overlap([row], TRAINING)
    assert [(twin.row, twin.trained, twin.likeness) for twin in found.twins] == (
        [("row", where, likeness)] if likeness else []
    )
    assert found.unseen == (frozenset() if likeness else {"row"})
    assert found.trained().keys() == ({"row"} if likeness in ("row", "answer") else set())
    assert found.values()["alike"] == {each: int(each == likeness) for each in LIKENESS}
    assert bool(found.sentences("file")) == bool(likeness)
    assert all(
        f"(row as {where})" in said and said.endswith("; 0 rows count as unseen") for said in found.sentences("file")
    )


@given(st.lists(EXAMPLES, max_size=8), st.lists(EXAMPLES, max_size=8), st.integers(1, 3))
def test_no_row_of_training_is_unseen(held: list[Example], training: list[Example], compared: int) -> None:
    """However few rows are compared, none that stands in training counts as unseen, and none is counted twice."""
    rows = [replace(each, where=f"row:{at}") for at, each in enumerate([*held, *training])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "COMPARED", compared)
        found = find_overlap(rows, training)
    assert found.rows == len(rows)
    trained = {each.where for each in rows[len(held) :] if text_of(each).strip()}
    assert not trained & found.unseen
    assert len({twin.row for twin in found.twins}) == len(found.twins)
    assert len(found.compared) <= len(found.twins) + compared


def row(number: int, answer: str = "") -> dict[str, str]:
    """A row that shares no word with one of another number."""
    return {"prompt": f"who{number} is{number} it{number}?", "completion": answer or f"{number}"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return make_model(tmp_path_factory.mktemp("overlap") / "model")


def run_on(model: Path, place: Path, files: dict[str, list[dict[str, str]]], **changes: Any) -> LoadedConfig:
    """A quick run on these files, each under its setting's name."""
    for name, rows in files.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    named = {f"data__{name}": str(place / f"{name}.jsonl") for name in files}
    return settings(model, place / "train.jsonl", **named, **changes)


def test_what_training_repeats_is_neither_measured_nor_asked(model: Path, tmp_path: Path) -> None:
    """Rows of training and of rehearsal alike; what is left is counted, and told with the places of both rows."""
    files = {
        "train": [row(n) for n in range(12)],
        "rehearsal": [row(n) for n in range(20, 24)],
        "valid": [row(3), row(21), row(5, "else"), *(row(n) for n in range(30, 37))],
        "retention": [row(2), row(22, "else"), *(row(n) for n in range(40, 46))],
    }
    prepared = prepare(run_on(model, tmp_path, files))
    assert prepared.held_out is not None
    assert (prepared.held_out.counts.read, prepared.held_out.counts.kept) == (10, 8)
    assert prepared.held_out.counts.dropped == {"stands in the training rows word for word": 2}
    assert len(prepared.overlaps["valid"].unseen) == 7
    assert len(prepared.retention) == 6
    [valid, kept] = [note for note in prepared.notes if "in the rows trained on" in note]
    both = f"{tmp_path}/valid.jsonl:1 as {tmp_path}/train.jsonl:4"
    assert f"3 of 10 rows stand in the rows trained on: 2 word for word ({both})" in valid
    assert valid.endswith("7 rows count as unseen")
    assert f"1 with the same prompt ({tmp_path}/retention.jsonl:2 as {tmp_path}/rehearsal.jsonl:3)" in kept
    with without_reload_check():
        _, record = fine_tune(run_on(model, tmp_path, files), output=tmp_path / "run")
    verdicts = {each["id"]: each for each in record["verdicts"]}
    assert verdicts["loss-held-out"]["measured"].endswith("on 7 rows that training does not repeat")
    assert record["data"]["overlap"]["valid"]["alike"] == {"row": 2, "answer": 0, "prompt": 1, "near": 0}
    assert {valid, kept} <= set(record["notes"])


def test_what_is_nearly_said_in_training_is_asked_and_told(model: Path, tmp_path: Path) -> None:
    """A sum with its terms exchanged is another question: the verdict on what is kept counts it, and says so."""
    sums = [{"prompt": f"What is {n} plus {n + 40}?", "completion": str(2 * n + 40)} for n in range(12)]
    turned = [{**row, "prompt": f"What is {n + 40} plus {n}?"} for n, row in enumerate(sums)]
    loaded = run_on(model, tmp_path, {"train": sums[:9], "retention": [sums[0], *turned[1:6], *sums[9:]]})
    assert len(prepare(loaded).retention) == 8
    with without_reload_check():
        _, record = fine_tune(loaded, output=tmp_path / "run")
    [verdict] = [each for each in record["verdicts"] if each["id"] == "learning-retention"]
    assert verdict["measured"].endswith("on 8 questions; 5 rows nearly as in training")
    assert record["data"]["overlap"]["retention"]["alike"] == {"row": 1, "answer": 0, "prompt": 0, "near": 5}


def test_a_file_that_is_trained_on_shows_nothing_unseen(model: Path, tmp_path: Path) -> None:
    """One file for training, validation and retention: both verdicts are inconclusive, with the reason."""
    rows = [row(n) for n in range(8)]
    loaded = run_on(model, tmp_path, {"train": rows, "valid": rows, "retention": rows})
    with without_reload_check():
        _, record = fine_tune(loaded, output=tmp_path / "run")
    verdicts = {each["id"]: each for each in record["verdicts"]}
    for name in ("loss-held-out", "learning-retention"):
        assert (verdicts[name]["outcome"], verdicts[name]["measured"]) == ("inconclusive", "not measured")
        assert "8 of the" in verdicts[name]["reason"]
        assert (
            "stand in the rows trained on, whole or in part, and 0 that do not are too few" in verdicts[name]["reason"]
        )
    assert record["losses"]["held_out"] == []
    assert record["not_measured"]["held_out"] == "all 8 rows stand in the rows trained on"
    with pytest.raises(ConfigError, match=r"all 8 rows of .*valid\.jsonl\) stand in the rows trained on"):
        prepare(run_on(model, tmp_path, {"train": rows, "valid": rows}, training__early_stopping_patience=2))


@pytest.mark.parametrize(("left", "outcome"), [(5, "inconclusive"), (6, "passed")])
def test_few_rows_that_are_left_decide_nothing(model: Path, tmp_path: Path, left: int, outcome: str) -> None:
    """Five of which the loss falls could be chance; six are not."""
    rows = [row(n) for n in range(12)]
    valid = [row(0), *({"prompt": f"new{n} {n}", "completion": "1"} for n in range(left))]
    with without_reload_check():
        _, record = fine_tune(run_on(model, tmp_path, {"train": rows, "valid": valid}), output=tmp_path / "run")
    [found] = [each for each in record["verdicts"] if each["id"] == "loss-held-out"]
    assert found["outcome"] == outcome
