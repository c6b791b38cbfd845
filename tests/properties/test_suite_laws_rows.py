"""The suite's laws of settings, rows, templates, masks and batches: our trainer keeps them, and faults break them."""

from pathlib import Path

import pytest

from finetune.verify.faults.fault import faults
from finetune.verify.suite.catalogue import CaseLaw
from finetune.verify.suite.trainer import Trainer
from properties.suite_on_ours import ROWS, laws_of, our_trainer, see_it_broken, see_it_hold

pytestmark = pytest.mark.tools

LAWS = laws_of(*ROWS)
STAGES = {"config", "data", "tmpl", "mask", "shift", "tok", "pack", "pad"}
KILLED = {
    "A003": "config.taken",
    "A020": "cache.same",
    "A027b": "rows.remarks",
    "A041": "template.bos",
    "A067": "mask.turns",
    "A078": "mask.surprise",
    "A104": "packing.cover",
    "A109b": "padding.no_target",
}
"""Faults of each stage, and a law that is broken by each; `ft prove` plants all of them."""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Our own trainer."""
    return our_trainer(tmp_path_factory.mktemp("suite"))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.id)
def test_suite_law_holds_on_our_own_trainer(law: CaseLaw, trainer: Trainer) -> None:
    """Every law of these rooms holds on a fraction of its cases, and none of them is left unjudged."""
    see_it_hold(law, trainer, times=0.25)


def test_suite_has_its_laws_and_faults() -> None:
    """There are as many as there must be; each law says what decides, and each fault says what goes wrong."""
    assert len(LAWS) >= 38
    assert all(law.oracle and law.law.statement.endswith(".") for law in LAWS)
    known = [each for each in faults().values() if each.stage in STAGES]
    assert len(known) >= 80
    assert all(each.what and each.id[1:4].isdigit() and int(each.id[1:4]) <= 110 for each in known)


@pytest.mark.parametrize(("planted", "law"), KILLED.items())
def test_suite_law_is_broken_by_a_fault(
    planted: str, law: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that is planted in our trainer is noticed, in a case that is made small."""
    see_it_broken(planted, law, tmp_path, monkeypatch)
