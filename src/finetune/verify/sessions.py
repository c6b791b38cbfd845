"""A pytest plugin: adds what a session of a tier measured to the history of the tests, when it is over.

`pytest_plugins = ["finetune.verify.sessions"]` in a `conftest.py` takes it in. It writes only where `FT_TIER` is 1, 2
or 3 (the Makefile's tier targets set it), to `FT_HISTORY` or `.finetune/history.jsonl`. A test adds a score by
`record_property("score.<name>", value)`. With pytest-xdist the sessions of all workers are one.
"""

import math
import os
import platform
import re
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pytest

from finetune.errors import StorageError
from finetune.processes import largest_child, peak_rss
from finetune.report.history import HISTORY, SCORE_NAME, HistoryEntry, append_entry

__all__ = ["pytest_configure"]

SCORE = "score."
TIERS: dict[str, Literal[1, 2, 3]] = {"1": 1, "2": 2, "3": 3}
_COUNTS = {"passed": "passed", "failed": "failed", "error": "errors", "skipped": "skipped", "xfailed": "skipped"}
"""Under which count each of pytest's categories goes; an expected failure has proved as little as a skipped test."""


def pytest_configure(config: pytest.Config) -> None:
    """Have this session recorded, if it is one of a tier."""
    named = os.environ.get("FT_TIER", "")
    if named and named not in TIERS:
        raise pytest.UsageError(f"there is no tier {named!r}: FT_TIER is 1, 2 or 3, or not set")
    if named and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config, TIERS[named]), "finetune-history")


class Recorder:
    """What the reports of all tests, whoever ran them, say of a session."""

    def __init__(self, config: pytest.Config, tier: Literal[1, 2, 3]) -> None:
        self.config = config
        self.tier = tier
        self.when, self.began = datetime.now(UTC), time.monotonic()
        self.counts: Counter[str] = Counter()
        self.recorded: list[tuple[str, object]] = []
        self.lines: list[str] = []
        self.stopped = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one report, and take the scores that a test has left."""
        category = self.config.hook.pytest_report_teststatus(report=report, config=self.config)[0]
        if category in _COUNTS:
            self.counts[_COUNTS[category]] += 1
        if report.when == "call" and not report.skipped:
            found = [(str(name), value) for name, value in report.user_properties]
            self.recorded += [(name.removeprefix(SCORE), value) for name, value in found if name.startswith(SCORE)]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Count a file that cannot be collected."""
        self.counts["errors"] += report.failed

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """A session that somebody stopped says nothing of its tier; one that its own errors ended does."""
        self.stopped = not isinstance(excinfo.value, pytest.Session.Interrupted)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Write the entry, when the workers have ended and been waited for, so that their sizes are known, too."""
        if self.stopped or not self.counts.total():
            self.lines.append("this session was not recorded: it was stopped, or had no tests")
            return
        path = Path(os.environ.get("FT_HISTORY") or self.config.rootpath / HISTORY)
        scores, complaints = measured_scores(self.recorded)
        self.lines += complaints
        try:
            append_entry(path, self._entry(scores))
        except StorageError as error:
            self.lines.append(f"this session was not recorded: {error}")
        else:
            self.lines.append(f"recorded in {path}; ft report --history shows it")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Tell where the entry went, or why there is none."""
        terminalreporter.section("history")
        for line in self.lines:
            terminalreporter.write_line(line)

    def _entry(self, scores: dict[str, float]) -> HistoryEntry:
        return HistoryEntry(
            when=self.when,
            tier=self.tier,
            commit=commit_of(self.config.rootpath),
            python=".".join(platform.python_version_tuple()[:2]),
            platform=f"{platform.system()}-{platform.machine()}",
            profile=_profile(),
            seconds=time.monotonic() - self.began,
            passed=self.counts["passed"],
            failed=self.counts["failed"],
            skipped=self.counts["skipped"],
            errors=self.counts["errors"],
            cases=None,
            largest_process_bytes=max(peak_rss() or 0, largest_child() or 0) or None,
            scores=scores,
        )


def measured_scores(recorded: Sequence[tuple[str, object]]) -> tuple[dict[str, float], list[str]]:
    """Of what tests recorded, the scores, and a sentence for each that is none."""
    scores: dict[str, float] = {}
    complaints = []
    for name, value in recorded:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            complaints.append(f"the score {name!r} was left out, for it is no number: {value!r}")
        elif not re.fullmatch(SCORE_NAME, name):
            complaints.append(f"the score {name!r} was left out: its name is not made of 1 to 100 plain characters")
        elif name in scores:
            complaints.append(f"the score {name!r} was recorded twice, {scores[name]} and {value}: the first counts")
        else:
            scores[name] = float(value)
    return scores, complaints


def commit_of(folder: Path) -> str | None:
    """The short hash of the checkout's commit; None where there is no checkout or no git."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip() or None) if done.returncode == 0 else None


def _profile() -> str | None:
    """Hypothesis' profile, without what pytest's options have added to its name; None where nobody has loaded one."""
    from hypothesis import settings

    name = settings.get_current_profile_name().partition("-with-")[0]
    return None if name == "default" else name
