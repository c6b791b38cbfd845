"""Laws of rows that are too many to be held: read again from a file, they are the same and make the same run."""

import gzip
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune import processes
from finetune.config import LoadedConfig
from finetune.data import stored
from finetune.data.batches import epoch_batches
from finetune.data.stored import Outlines, join, keep, pick, sizes_of
from finetune.errors import FineTuneError
from finetune.evidence import forecast
from finetune.evidence.record import run_owner
from finetune.records import Conversation, Document, Message, TokenizedRow
from finetune.training.prepare import Prepared, prepare
from finetune_strategies.conversations import conversations, texts
from support.workplace import settings

Row = Conversation | Document | TokenizedRow
IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)


def tokenized() -> st.SearchStrategy[TokenizedRow]:
    """A row of ids, alone or preferred to another."""

    def row(ids: list[int], other: list[int] | None, learned: bool) -> TokenizedRow:
        rejected = None if other is None else TokenizedRow(tuple(other), (True,) * len(other), "a:1")
        return TokenizedRow(tuple(ids), (False, learned, *[True] * len(ids))[: len(ids)], "a:1", rejected)

    return st.builds(row, IDS, st.none() | IDS, st.booleans())


MESSAGES = st.builds(Message, st.just("assistant"), texts(), texts(), st.none() | st.booleans())
TALKS = st.builds(
    Conversation,
    st.lists(MESSAGES, max_size=3).map(tuple),
    texts(),
    texts(),
    texts(),
    st.booleans(),
    st.none() | MESSAGES,
)
ROWS = st.lists(st.one_of(tokenized(), TALKS, conversations(), st.builds(Document, texts(), texts())), max_size=40)


def kept(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows in a file, however few they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "IN_MEMORY", 0)
        return keep(iter(rows))


@given(ROWS, st.slices(40), st.randoms(use_true_random=False))
def test_stored_rows_are_the_rows(rows: list[Row], some: slice, dice: Any) -> None:
    """Rows that were kept in a file are equal to what they were: all in order, each at its place, and any part."""
    found = kept(rows)
    assert [*found] == rows
    assert [*found[some]] == rows[some]
    places = [dice.randrange(len(rows)) for _ in rows]
    assert [found[place] for place in places] == [*pick(found, places)] == [rows[place] for place in places]
    assert [*join(found, (), rows, found)] == rows * 3
    tokens = [row for row in rows if isinstance(row, TokenizedRow)]
    assert sizes_of(kept(tokens)).tolist() == sizes_of(tokens).tolist()  # type: ignore[arg-type]


def lines(rows: Sequence[dict[str, Any]]) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def asked(count: int) -> list[dict[str, Any]]:
    """Questions, among them an empty answer, some that come again, and some too long."""
    long = {7: "word " * 90, 30: "word " * 80}
    rows = [{"prompt": f"what is {n % 37} {long.get(n, '')}", "completion": f"it is {n % 40}"} for n in range(count)]
    rows[5]["completion"] = ""
    return rows


def pairs(count: int) -> list[dict[str, Any]]:
    """Two answers to each question, some of which are the same."""
    return [{"prompt": f"what is {n}", "chosen": f"{n % 9}", "rejected": f"{n % 4} not"} for n in range(count)]


def twice_told(count: int) -> list[dict[str, Any]]:
    """Conversations with two system prompts, which alpaca does not take."""
    said = [("system", "be short"), ("user", "a"), ("system", "be kind")]
    begun = [{"role": role, "content": content} for role, content in said]
    return [{"messages": [*begun, {"role": "assistant", "content": f"{n}"}]} for n in range(count)]


CASES: dict[str, dict[str, Any]] = {
    "held out": {"data__valid_fraction": 0.3},
    "a file of its own": {
        "data__valid": "valid.jsonl",
        "data__rehearsal": "more.jsonl",
        "data__retention": "valid.jsonl",
    },
    "packed": {"training__packing": True, "tokens__truncation": "truncate_prompt"},
    "mixed": {"data__train": ("rows.jsonl", "more.jsonl"), "data__mix": (1, 2), "data__limit": 30},
    "texts in pieces": {"data__train": ("texts.txt",), "tokens__truncation": "split"},
    "pairs": {"data__train": ("pairs.jsonl",), "training__objective": "dpo", "training__packing": True},
    "some refused": {"data__train": ("some.jsonl",), "template__name": "alpaca", "tokens__max_length": 256},
    "packed by gzip": {"data__train": ("rows.jsonl.gz",)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of rows."""
    found = tmp_path_factory.mktemp("rows")
    files = {
        "rows.jsonl": lines(asked(60)),
        "valid.jsonl": lines([*asked(6), *({"prompt": f"unseen {n}", "completion": "no"} for n in range(5))]),
        "more.jsonl": lines([{"prompt": f"tell {n}", "completion": "yes"} for n in range(40)]),
        "texts.txt": "".join(f"text {n} {'and more ' * (n % 40)}\n" for n in range(20)).encode(),
        "pairs.jsonl": lines(pairs(30)),
        "some.jsonl": lines([*asked(30), *twice_told(4), *asked(10)]),
        "rows.jsonl.gz": gzip.compress(lines(asked(60))),
    }
    for name, content in files.items():
        (found / name).write_bytes(content)
    return found


def planned(model: Path, folder: Path, case: dict[str, Any]) -> LoadedConfig:
    """The settings of a case; its files lie in the folder."""

    def there(value: Any) -> Any:
        return tuple(map(there, value)) if isinstance(value, tuple) else str(folder / value)

    files = ("data__train", "data__valid", "data__rehearsal", "data__retention")
    placed = {key: there(value) if key in files else value for key, value in case.items()}
    return settings(model, folder / "rows.jsonl", **{"tokens__max_length": 64, **placed})


def said(found: Prepared) -> dict[str, Any]:
    """All that a run is made of, and what is told of it."""
    encoded = {"train": found.train, "rehearsal": found.rehearsal, "held out": found.held_out}
    training = found.plan.config.training
    length = 64 if training.packing else None
    counted = forecast.forecast_run(found)
    return {
        "rows": {name: [*each.rows] for name, each in encoded.items() if each},
        "counts": {name: each.counts for name, each in encoded.items() if each},
        "conversations": [*found.conversations],
        "asked": (found.questions, found.retention, found.unseen, found.answers),
        "told": (found.notes, found.overlaps, found.sources, found.total_steps),
        "batches": [[*epoch_batches(found.training_rows, 4, seed=3, epoch=at, pack_length=length)] for at in (0, 1)],
        "forecast": (counted.steps, counted.tokens, counted.trained_tokens),
        "owner": run_owner(found, {}),
    }


@pytest.mark.parametrize("name", CASES)
def test_streamed_rows_are_rows_read_whole(
    model: Path, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few rows are held in memory: the same rows, counts, drops, questions, batches and identity of the run."""
    monkeypatch.setattr(forecast, "_MEASURED_SECONDS", 0.0)
    loaded = planned(model, folder, CASES[name])
    whole = said(prepare(loaded))
    monkeypatch.setattr(stored, "IN_MEMORY", 3)
    monkeypatch.setattr(stored, "PART", 7)
    monkeypatch.setattr(processes, "usable_cores", lambda: 2)
    found = prepare(loaded)
    assert not stored.in_memory(found.train.rows)
    assert said(found) == whole


def test_many_rows_that_no_template_takes_are_refused_as_few_are(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the template refuses most rows, or a row is too long, all cores say what one says: rows and their count."""
    rows = twice_told(30)
    refused: list[str] = []
    for few in (1000, 3):
        monkeypatch.setattr(stored, "IN_MEMORY", few)
        monkeypatch.setattr(stored, "PART", 7)
        monkeypatch.setattr(processes, "usable_cores", lambda: 3)
        for name, content, changes in (
            ("odd", rows, {"template__name": "alpaca"}),
            ("long", asked(30), {"tokens__truncation": "refuse", "tokens__max_length": 20}),
        ):
            path = tmp_path / f"{name}.jsonl"
            path.write_bytes(lines(content))
            with pytest.raises(FineTuneError) as told:
                prepare(settings(model, path, **changes))
            refused.append(str(told.value))
    assert refused[:2] == refused[2:]
    assert "30 of 30 rows" in refused[0]
    assert "29 rows are longer" in refused[1]


@pytest.mark.parametrize("cores", [1, 2, 3, 9])
def test_cores_do_parts_in_order(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of parts comes in their order and whole, also of a child that is killed; an error is raised here."""
    monkeypatch.setattr(processes, "usable_cores", lambda: cores)
    here, others = os.getpid(), {*psutil.Process().children()}

    def work(part: int) -> bytes:
        if part == 5 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return bytes([part]) * (part * 30_000)

    assert [*processes.on_all_cores(work, 8)] == [bytes([part]) * (part * 30_000) for part in range(8)]
    found = processes.on_all_cores(lambda part: bytes(10 // (3 - part)), 8)
    assert [len(next(found)) for _ in range(3)] == [3, 5, 10]
    with pytest.raises(ZeroDivisionError):
        next(found)
    stopped = processes.on_all_cores(work, 8)
    next(stopped)
    stopped.close()
    assert {*psutil.Process().children()} <= others  # no child is left, not even a dead one


def test_outlines_are_as_large_as_their_rows() -> None:
    """Steps and tokens are counted on rows that say nothing, and are those of the rows; a pair is as long as both."""
    rows = [TokenizedRow((1,) * size, (True,) * size, "a:1") for size in (1, 5, 3)]
    rows.append(TokenizedRow((1, 2), (False, True), "a:1", rows[1]))
    outlines = Outlines(kept(rows))  # type: ignore[arg-type]
    assert [(len(each.ids), each.target_count) for each in outlines] == [(1, 0), (5, 4), (3, 2), (7, 5)]
