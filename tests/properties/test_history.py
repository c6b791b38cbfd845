"""Laws of the tests' own history: no session is lost, none is invented, and a gap stays a gap."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.cli.app import run
from finetune.report.history import HistoryEntry, append_entry, draw_trends, read_history
from finetune_strategies.profiles import examples
from finetune_strategies.scratch import empty_folder
from support.recorded_scores import record_scores
from support.sample_run import sample_run

pytestmark = pytest.mark.tools

COUNTS = st.integers(0, 10**6)
NAMES = st.from_regex(r"[A-Za-z0-9][ -~]{0,99}", fullmatch=True)
ENTRIES = st.builds(
    HistoryEntry,
    when=st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),
    tier=st.sampled_from([1, 2, 3]),
    commit=st.none() | st.just("abc1234"),
    python=st.just("3.12"),
    platform=st.just("Linux-x86_64"),
    profile=st.none() | st.just("fast"),
    seconds=st.floats(0, 1e9),
    passed=COUNTS,
    failed=COUNTS,
    skipped=COUNTS,
    errors=COUNTS,
    cases=st.none() | COUNTS,
    largest_process_bytes=st.none() | st.integers(1, 2**50),
    scores=st.dictionaries(NAMES, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
)


def entry(day: int = 0, **changes: Any) -> HistoryEntry:
    """A session of Tier 1, so many days after the first."""
    usual: dict[str, Any] = {
        "when": datetime(2026, 11, 1, tzinfo=UTC) + timedelta(days=day),
        "tier": 1,
        "commit": "abc1234",
        "python": "3.12",
        "platform": "Linux-x86_64",
        "profile": "fast",
        "seconds": 30.0,
        "passed": 9,
        "failed": 1,
        "skipped": 5,
        "errors": 0,
        "cases": 9000,
        "largest_process_bytes": 400_000_000,
    }
    return HistoryEntry(**{**usual, **changes})


@given(st.lists(ENTRIES, max_size=3), st.binary(max_size=9))
@examples(1 / 3)
def test_history_gives_back_what_was_added(entries: Sequence[HistoryEntry], torn: bytes) -> None:
    """Every session is read as it was written, oldest first, whatever a killed writer left between them."""
    with empty_folder() as folder:
        path = folder / "deep" / "history.jsonl"
        for each in entries:
            append_entry(path, each)
            with path.open("ab") as file:
                file.write(torn.replace(b"\n", b" "))
        if not entries:
            return
        found, problems = read_history(path)
        assert found == sorted(entries, key=lambda each: each.when)
        assert len(problems) == (len(entries) if torn.replace(b"\n", b" ").strip() else 0)


GOOD = json.loads(entry().model_dump_json())
DAMAGED = [
    ("{", "Invalid JSON"),
    ("[1]", "should be"),
    ("\x00\x01", "Invalid JSON"),
    (json.dumps({**GOOD, "format": 2}), "format: Input should be 1 (it is 2)"),
    (json.dumps({**GOOD, "tier": 4}), "tier"),
    (json.dumps({**GOOD, "passed": -1}), "passed"),
    (json.dumps({**GOOD, "passed": True}), "passed"),
    (json.dumps({**GOOD, "seconds": "30"}), "seconds"),
    (json.dumps({**GOOD, "when": "2026-11-01T00:00:00"}), "when"),
    (json.dumps({**GOOD, "scores": {"x": None}}), "scores.x"),
    (json.dumps({**GOOD, "scores": {"<b>": 1}}), "<b>"),
    (json.dumps({**GOOD, "more": 1}), "more: Extra"),
    (json.dumps({key: value for key, value in GOOD.items() if key != "cases"}), "cases: Field required"),
]


def test_history_names_each_damaged_line_and_reads_the_rest(tmp_path: Path) -> None:
    """Each of these ways to be no entry is told with its line and value; the sessions around it are there."""
    path, good = tmp_path / "history.jsonl", entry().model_dump_json()
    path.write_text("\n".join(f"{good}\n{line}" for line, _ in DAMAGED), encoding="utf-8")
    found, problems = read_history(path)
    assert found == [entry()] * len(DAMAGED)
    assert len(problems) == len(DAMAGED)
    for number, (problem, (_, told)) in enumerate(zip(problems, DAMAGED, strict=True), start=1):
        assert problem.startswith(f"{path}:{2 * number}: ")
        assert told in problem


ADDING = """
import os, sys, time
from pathlib import Path
from finetune.report.history import HistoryEntry, append_entry
Path(f"ready-{os.getpid()}").touch()
while len(list(Path().glob("ready-*"))) < 2:
    time.sleep(0.001)
entry = HistoryEntry.model_validate_json(sys.argv[2])
os.fsync = lambda handle: None  # what is looked for here is order, not the disk
for number in range(200):
    append_entry(Path(sys.argv[1]), entry.model_copy(update={"passed": number}))
"""


def test_history_takes_lines_of_two_processes(tmp_path: Path) -> None:
    """Two processes that add at once lose no line and mix none."""
    path = tmp_path / "history.jsonl"
    command = [sys.executable, "-c", ADDING, str(path)]
    started = [
        subprocess.Popen(
            [*command, entry(scores={f"{name} {n}": 0.5 for n in range(99)}).model_dump_json()], cwd=tmp_path
        )
        for name in "ab"
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    found, problems = read_history(path)
    assert problems == []
    for name in "ab":
        assert [each.passed for each in found if f"{name} 0" in each.scores] == list(range(200))


def strokes(svg: str, mark: str = "mark-0") -> str:
    """The path of a line, without its markers: M begins a stroke, L goes on."""
    found = re.search(rf'<g id="[^"]*{mark}">\s*<path d="([^"]*)"', svg)
    assert found is not None
    return "".join(re.findall("[ML]", found[1]))


def test_trend_keeps_gaps_and_joins_no_two_machines() -> None:
    """A line breaks where a session measured nothing, and goes on over sessions of another machine."""
    cases = [1, 2, None, 4, None, 6, 7]
    charts = {chart.name: chart for chart in draw_trends([entry(n, cases=each) for n, each in enumerate(cases)], "a")}
    assert strokes(charts["cases"].svg or "") == "MLMML"  # 4 stands alone: a point, and no stroke
    assert "1 to 7 in 5" in (charts["cases"].svg or "")
    assert strokes(charts["seconds"].svg or "") == "MLLLLLL"
    mixed = [entry(n, platform="Darwin-arm64" if n in (1, 3) else "Linux-x86_64") for n in range(5)]
    [time, *_] = draw_trends(mixed, "a")
    assert (strokes(time.svg or "", "mark-0"), strokes(time.svg or "", "mark-1")) == ("MLL", "ML")


def test_page_of_the_history_shows_every_session_and_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ft report --history` shows files together, oldest first, names what is damaged, and writes page and JSON."""
    monkeypatch.chdir(tmp_path)
    assert run(["report", "--history"]) == 3
    assert "make test-e2e-workflow" in capsys.readouterr().err
    append_entry(Path(".finetune/history.jsonl"), entry(1))
    append_entry(Path("other.jsonl"), entry(0, tier=2, commit=None, scores={"m/torch tuned": 0.9}))
    with Path("other.jsonl").open("a") as file:
        file.write("<b>\n")
    assert run(["report", "--history", "--json"]) == 0
    assert [each["tier"] for each in json.loads(capsys.readouterr().out)["entries"]] == [1]
    files = [".finetune/history.jsonl", "other.jsonl"]
    assert run(["report", "--history", *files, "--html", "page.html"]) == 0
    told = capsys.readouterr()
    assert "other.jsonl:2: " in told.err
    assert "m/torch tuned: 0.900" in told.out
    page = Path("page.html").read_text(encoding="utf-8")
    assert page.index("Tier 1") < page.index("Tier 2") < page.index("m/torch")
    assert page.count("<svg ") == 9
    assert "other.jsonl:2: " in page
    assert "unknown" in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(set(ids)) == len(ids)
    assert run(["report", "--history", *files, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [each["tier"] for each in shown["entries"]] == [2, 1]
    assert len(shown["problems"]) == 1


def test_scores_of_a_run_are_those_that_it_measured() -> None:
    """Tier 2 records new facts with all three models, old facts, and both reductions; of an empty run, nothing."""
    recorded: dict[str, object] = {}
    record_scores(recorded.__setitem__, sample_run(), backend="mlx")
    names = [name.removeprefix("score.tiny-llama/mlx ") for name in recorded]
    new = ["new facts, base", "new facts, tuned", "new facts, control"]
    assert names == [*new, "old facts, base", "old facts, tuned", "loss reduction", "memory reduction"]
    assert recorded["score.tiny-llama/mlx new facts, tuned"] == 0.9
    record_scores(recorded.__setitem__, {}, backend="torch")
    assert len(recorded) == 7
