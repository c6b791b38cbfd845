"""The pytest plugin's tests, one for each law: `plugin` registers this file where `--finetune-subject` names a trainer.

With pytest-xdist each law is judged where its test is run.
"""

import contextlib
from typing import Any

import pytest

from finetune.errors import FineTuneError
from finetune.verify.catalogue import Law
from finetune.verify.judge import Effort
from finetune.verify.results import LawResult, severity_of
from finetune.verify.run import chosen_laws, opened_trainer, verify
from finetune.verify.subjects.subject import SubjectError

__all__ = ["pytest_collection_modifyitems"]


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test for each law."""
    name = f"finetune[{config.getoption('--finetune-subject')}]"
    items += _Laws.from_parent(session, name=name, nodeid=name).collect()


class _Laws(pytest.Collector):
    """All laws of a tier; the trainer is opened for the first of them, and closed with the session."""

    def collect(self) -> list[pytest.Item]:
        laws = chosen_laws(self.config.getoption("--finetune-tier"))
        items: list[pytest.Item] = [_LawItem.from_parent(self, name=law.id, law=law) for law in laws]
        return items


class _LawItem(pytest.Item):
    """One law."""

    def __init__(self, *, law: Law, **more: Any) -> None:
        super().__init__(**more)
        self.law = law
        self.add_marker("finetune")

    def runtest(self) -> None:
        """Judge it.

        Raises:
            AssertionError: it is broken, or could not be judged.
        """
        found = verify(_trainer(self.config), [self.law], Effort(seed=self.config.getoption("--finetune-seed")))
        [result] = found.results
        if result.outcome == "not applicable":
            pytest.skip(result.why)
        if result.outcome != "passed":
            raise LawError(result)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, LawError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[str, int | None, str]:
        return self.nodeid, None, f"{self.law.id}: {self.law.statement}"


class LawError(AssertionError):
    """A law does not hold, or could not be judged; the words are the evidence."""

    def __init__(self, result: LawResult) -> None:
        lines = [f"{result.outcome}: {result.law} ({severity_of(result.law)}): {result.statement}"]
        if result.outcome == "failed":
            lines += [f"expected: {result.expected}", f"got: {result.got}", f"smallest case: {result.case}"]
        super().__init__("\n  ".join([*lines, result.why] if result.why else lines))


_OPEN = pytest.StashKey[Any]()


def _trainer(config: pytest.Config) -> Any:
    """The trainer of this session."""
    if _OPEN not in config.stash:
        ends = contextlib.ExitStack()
        config.add_cleanup(ends.close)
        opened = opened_trainer(config.getoption("--finetune-subject"), config.getoption("--finetune-python"))
        try:
            config.stash[_OPEN] = ends.enter_context(opened)
        except (FineTuneError, SubjectError) as error:
            pytest.exit(f"the trainer cannot be asked: {error}", returncode=pytest.ExitCode.USAGE_ERROR)
    return config.stash[_OPEN]
