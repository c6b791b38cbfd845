"""The suite's laws of losses, resuming, results and safety: our trainer keeps them, and faults break them."""

from pathlib import Path

import pytest

from finetune.verify.faults.fault import faults
from finetune.verify.suite.catalogue import CaseLaw, case_laws
from finetune.verify.suite.trainer import Trainer
from properties.suite_on_ours import RESULTS, ROWS, laws_of, our_trainer, see_it_broken, see_it_hold

pytestmark = pytest.mark.tools

LAWS = laws_of(*RESULTS)
KILLED = {
    "A130": "schedule.closed_form",
    "A168": "store.torn",
    "A177": "resume.damaged",
    "A181": "adapter.damaged",
    "A200": "merge.exact",
    "A220": "export.weights",
    "A305": "serve.recipe",
    "A267": "generate.fits",
    "A282": "memory.counts",
    "A295": "safety.files",
}
"""Faults of each stage, and a law that is broken by each without another process to compare with."""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Our own trainer."""
    return our_trainer(tmp_path_factory.mktemp("suite"))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.id)
def test_suite_law_of_results_holds_on_our_own_trainer(law: CaseLaw, trainer: Trainer) -> None:
    """Every law of these rooms holds on a case; `ft prove` judges our trainer by all of them."""
    see_it_hold(law, trainer, times=0.01)


def test_suite_has_no_law_that_no_room_here_has() -> None:
    """Every law of Tier 1 is held against our own trainer, here or among those of rows."""
    assert {law.id for law in laws_of(*ROWS, *RESULTS)} == case_laws(1).keys()


def test_suite_has_its_laws_and_faults_of_results() -> None:
    """There are as many as there must be; each law says what decides, and each fault says what goes wrong."""
    assert len(LAWS) >= 55
    assert all(law.oracle and law.law.statement.endswith(".") for law in LAWS)
    known = [each for each in faults().values() if int(each.id[1:4]) >= 120]
    assert len(known) >= 110
    assert all(each.what for each in known)


@pytest.mark.parametrize(("planted", "law"), KILLED.items())
def test_suite_law_of_results_is_broken_by_a_fault(
    planted: str, law: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that is planted in our trainer is noticed, in a case that is made small."""
    see_it_broken(planted, law, tmp_path, monkeypatch)
