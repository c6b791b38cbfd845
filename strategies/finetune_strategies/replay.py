"""A pytest plugin: counts the cases that Hypothesis made, and tells for each failure the one command that replays it.

A `conftest.py` takes it in with `from finetune_strategies.replay import *`; with pytest-xdist the cases of all workers
are counted together. `pytest --least-cases 5000` fails a run that made fewer.
"""

import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from random import SystemRandom
from types import ModuleType
from typing import Any

import pytest
from hypothesis import is_hypothesis_test, settings
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import constants_from_module
from hypothesis.statistics import collector

from finetune_strategies.profiles import limit_shrinking

__all__ = [
    "pytest_addoption",
    "pytest_collection_finish",
    "pytest_configure",
    "pytest_runtest_call",
]

CASES, SEED = "hypothesis cases", "hypothesis seed"
PACKAGES = ("finetune", "finetune_strategies")
SWITCHES = ("FT_REAL_MODEL_ENABLE", "FT_TEST_MODEL", "FT_HYPOTHESIS_REPO", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
"""Variables that decide what a test does, and so belong to its replay."""
_COLLECTOR: Any = collector


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--least-cases`."""
    told = "fail unless Hypothesis generated at least this many cases in all"
    parser.getgroup("hypothesis").addoption("--least-cases", type=int, default=0, metavar="N", help=told)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Keep failing laws short, and begin to count."""
    limit_shrinking(_profile())
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Ledger(config), "finetune-ledger")


def pytest_collection_finish() -> None:
    """Make a law's cases depend on nothing but its seed."""
    know_every_constant()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Function) -> object:
    """Write down of how many cases the test was made, those it generated within itself too, and from which seed."""
    counted = kept = 0
    tell = _COLLECTOR.value

    def count(stats: Any) -> None:
        nonlocal counted, kept
        cases = stats.get("generate-phase", {}).get("test-cases", [])
        counted += sum(case["status"] in ("valid", "interesting") for case in cases)
        kept += stats.get("reuse-phase", {}).get("distinct-failures", 0)
        if tell is not None:
            tell(stats)

    number = _seed(item)
    try:
        with _COLLECTOR.with_value(count):
            return (yield)
    finally:
        # A failure that was kept comes again because it is kept; the seed knows nothing of it.
        item.user_properties.append((CASES, counted))
        item.user_properties.append((SEED, "" if kept else number))


def _seed(item: pytest.Function) -> str:
    """The seed that the test gets, or was given on the command line; none where nothing is left to chance.

    It is set as `hypothesis.seed` would set it; that, and the option for all tests, would keep no failures.
    """
    if not is_hypothesis_test(item.obj) or settings().derandomize:
        return ""
    given = item.config.getoption("--hypothesis-seed")
    if given is not None:
        return str(given)
    number = SystemRandom().getrandbits(32)
    function = getattr(item.obj, "__func__", item.obj)
    getattr(function, "_hypothesis_state_machine_class", function)._hypothesis_internal_use_seed = number
    return str(number)


def know_every_constant() -> None:
    """Let Hypothesis draw the numbers and words that stand anywhere in our source.

    It would take them from the modules that happen to be imported, so that the cases of a law would depend on which
    other tests were collected or had run: a failure of the whole suite would not come again when its test runs alone.
    """
    found = providers._local_constants
    for package in PACKAGES:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for file in sorted(Path(folder).rglob("*.py")):
                module = ModuleType(file.stem)
                module.__file__ = str(file)
                found |= constants_from_module(module)
    providers._local_constants = found


def replay_command(nodeid: str, config: pytest.Config, *, number: str = "") -> str:
    """The command, to be given in the project's folder, that runs this one test on the same cases again.

    `number` is the seed it had, if any.
    """
    variables = {"HYPOTHESIS_PROFILE": _profile()}
    variables |= {name: os.environ[name] for name in SWITCHES if os.environ.get(name)}
    program = Path(sys.prefix) / "bin" / "pytest"
    within = program.is_relative_to(config.rootpath) and program.exists()
    words = [*(f"{name}={shlex.quote(value)}" for name, value in variables.items())]
    words += [str(program.relative_to(config.rootpath)) if within else "pytest", shlex.quote(nodeid)]
    return " ".join([*words, *([f"--hypothesis-seed={number}"] if number else [])])


class Ledger:
    """What the reports of all tests, whoever ran them, say of cases and failures."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.cases: dict[str, int] = {}
        self.failed: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in one report."""
        told = dict(report.user_properties)
        if report.failed:
            self.failed[report.nodeid] = str(told.get(SEED, ""))
        cases = told.get(CASES)
        if report.when == "call" and isinstance(cases, int) and cases:
            self.cases[report.nodeid] = cases

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A run that made too few cases has failed."""
        if self.too_few and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @property
    def total(self) -> int:
        """How many cases all tests made."""
        return sum(self.cases.values())

    @property
    def profile(self) -> str:
        """The profile that they were made by."""
        return _profile()

    @property
    def too_few(self) -> bool:
        """Whether fewer cases were made than were asked for."""
        return self.total < int(self.config.getoption("--least-cases"))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Tell the sum, and the commands."""
        if not self.cases and not self.failed:
            return
        terminalreporter.section("cases and replays")
        told = f"Hypothesis generated {self.total:,} cases in {len(self.cases)} tests"
        terminalreporter.write_line(f"{told} (profile {self.profile})")
        if self.too_few:
            wanted = self.config.getoption("--least-cases")
            terminalreporter.write_line(f"that is fewer than the {wanted:,} asked for with --least-cases", red=True)
        for nodeid, number in self.failed.items():
            terminalreporter.write_line(f"replay: {replay_command(nodeid, self.config, number=number)}")


def _profile() -> str:
    """The loaded profile, without what pytest's own options have added to its name."""
    return settings.get_current_profile_name().partition("-with-")[0]
