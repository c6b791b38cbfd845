"""Laws of recorded sessions in real runs with the hooks of this suite: however many workers, one session, one line."""

from pathlib import Path

import pytest

from finetune.report.history import read_history
from scenarios.test_replays import TWO_LAWS, run

MB = 10**6
OUTCOMES = """
import pytest
def test_holds_much(record_property):
    held = bytearray(b"x" * 300_000_000)
    record_property("score.model tuned", 0.9)
    record_property("score.bad", float("nan"))
    record_property("other", 1)
def test_fails(record_property):
    record_property("score.of a failure", 1)
    assert 0
def test_skips(record_property):
    record_property("score.of nothing", 0)
    pytest.skip("cannot be had")
@pytest.mark.xfail
def test_is_known_to_fail(): assert 0
@pytest.fixture
def broken(): raise ValueError
def test_has_an_error(broken): ...
"""
DYING = "import os\ndef test_dies():\n    held = b'x' * 300_000_000\n    os._exit(3)\n"
STOPPED = "def test_passes(): ...\ndef test_is_stopped(): raise KeyboardInterrupt\n"
UNREADABLE = "import no_such_module\n"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_session_is_one_whoever_ran_its_tests(workers: str, tmp_path: Path) -> None:
    """Counts, scores and the largest process are those of all workers; without FT_TIER nothing is written."""
    (tmp_path / "test_laws.py").write_text(TWO_LAWS)
    (tmp_path / "test_outcomes.py").write_text(OUTCOMES)
    history = tmp_path / ".finetune" / "history.jsonl"
    run(tmp_path, "-n", workers)
    assert not history.exists()
    done = run(tmp_path, "-n", workers, FT_TIER="1")
    assert f"recorded in {history}" in done.stdout
    [entry], problems = read_history(history)
    assert problems == []
    assert (entry.passed, entry.failed, entry.skipped, entry.errors) == (3, 1, 2, 1)
    assert (entry.tier, entry.profile, entry.commit) == (1, "fast", None)
    assert "'bad' was left out" in done.stdout
    assert entry.scores == {"model tuned": 0.9, "of a failure": 1.0}
    assert entry.seconds > 0
    assert entry.largest_process_bytes is not None
    assert 300 * MB < entry.largest_process_bytes < 900 * MB


def test_session_whose_worker_died_knows_how_large_it_was(tmp_path: Path) -> None:
    """A worker that died counts as one failure, and its size as any other's."""
    (tmp_path / "test_dying.py").write_text(DYING)
    run(tmp_path, "-n", "1", FT_TIER="1", FT_HISTORY="kept.jsonl")
    [entry], _ = read_history(tmp_path / "kept.jsonl")
    assert entry.failed + entry.errors == 1
    assert (entry.largest_process_bytes or 0) > 300 * MB


def test_session_that_cannot_be_collected_is_recorded(tmp_path: Path) -> None:
    """A file that no worker can collect is one error of the session."""
    (tmp_path / "test_unreadable.py").write_text(UNREADABLE)
    run(tmp_path, "-n", "2", FT_TIER="1", FT_HISTORY="kept.jsonl")
    [entry], _ = read_history(tmp_path / "kept.jsonl")
    assert (entry.passed, entry.errors, entry.pass_rate) == (0, 1, 0.0)


def test_session_that_was_stopped_or_has_no_tier_leaves_nothing(tmp_path: Path) -> None:
    """A session that somebody stopped says so and writes nothing; a tier that there is not ends it at once."""
    (tmp_path / "test_it.py").write_text(STOPPED)
    assert "not recorded: it was stopped" in run(tmp_path, FT_TIER="1", FT_HISTORY="kept.jsonl").stdout
    refused = run(tmp_path, FT_TIER="4", FT_HISTORY="kept.jsonl")
    assert (refused.returncode, "'4'" in refused.stderr) == (4, True)
    assert not (tmp_path / "kept.jsonl").exists()
