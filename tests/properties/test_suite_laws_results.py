"""The suite's laws of losses, resuming, results and safety: our trainer keeps them, and faults break them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.verify.doors.late import LateDoor, unspoilt
from finetune.verify.faults import fault
from finetune.verify.suite.catalogue import CaseLaw, case_laws
from finetune.verify.suite.judge import Effort, judge
from finetune.verify.suite.trainer import Trainer
from finetune.verify.trainers.ours import inside

ROOMS = (
    "loss_laws", "schedule_laws", "resume_laws", "adapter_laws", "merge_laws", "export_laws", "serve_laws",
    "evaluate_laws", "memory_laws", "safety_laws",
)  # fmt: skip
LAWS = [law for law in case_laws(1).values() if law.check.__module__.rpartition(".")[2] in ROOMS]
KILLED = {
    "A120": "gradient.oracle",
    "A164": "resume.same",
    "A180": "adapter.travels",
    "A200": "merge.exact",
    "A220": "export.weights",
    "A305": "serve.recipe",
    "A260": "evaluate.oracle",
    "A282": "memory.counts",
    "A295": "safety.files",
}
"""Faults of each stage, and a law that is broken by each; `ft prove` plants all of them."""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Our own trainer in this process, in float64, which here is its own oracle."""
    scratch = tmp_path_factory.mktemp("suite")
    return Trainer(inside("reference", scratch), scratch)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.id)
def test_suite_law_of_results_holds_on_our_own_trainer(law: CaseLaw, trainer: Trainer) -> None:
    """Every law of these rooms holds on a fraction of its cases, and none of them is left unjudged."""
    judgement = judge(law, trainer, Effort(times=0.25))
    assert judgement.word == "holds", judgement


def test_suite_has_its_laws_and_faults_of_results() -> None:
    """There are as many as there must be; each law says what decides, and each fault says what goes wrong."""
    assert len(LAWS) >= 55
    assert all(law.oracle and law.law.statement.endswith(".") for law in LAWS)
    known = [each for each in fault.faults().values() if int(each.id[1:4]) >= 120]
    assert len(known) >= 100
    assert all(each.what for each in known)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LateDoor]:
    """Our trainer in a process without any fault."""
    door = unspoilt(tmp_path_factory.mktemp("oracle") / "home")
    yield door
    door.close()


@pytest.mark.parametrize(("planted", "law"), KILLED.items())
def test_suite_law_of_results_is_broken_by_a_fault(
    planted: str, law: str, oracle: LateDoor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that is planted in our trainer is noticed, in a case that is made small."""
    # What is planted is taken out again when the test ends.
    monkeypatch.setattr(fault, "setattr", monkeypatch.setattr, raising=False)
    trainer = Trainer(inside("reference", tmp_path), tmp_path, oracle)
    fault.faults()[planted].apply()
    judgement = judge(case_laws()[law], trainer, Effort(times=2, shrink_seconds=0.2))
    assert judgement.word == "broken", judgement
    assert judgement.case is not None
