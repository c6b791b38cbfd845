"""The suite's laws on our own trainer, in this process: one room of laws after the other is held to them."""

from pathlib import Path

import pytest

from finetune.verify.faults import fault
from finetune.verify.suite.catalogue import CaseLaw, case_laws
from finetune.verify.suite.judge import Effort, judge
from finetune.verify.suite.trainer import Trainer
from finetune.verify.trainers.ours import inside

ROWS = (
    "config_laws",
    "data_laws",
    "template_laws",
    "mask_laws",
    "mask_padding_laws",
    "batch_laws",
    "packing_laws",
)
RESULTS = (
    "loss_laws",
    "schedule_laws",
    "chance_laws",
    "resume_laws",
    "second_run_laws",
    "model_file_laws",
    "adapter_laws",
    "merge_laws",
    "export_laws",
    "serve_laws",
    "evaluate_laws",
    "memory_laws",
    "safety_laws",
)
"""The rooms of laws, by what they are about."""


def laws_of(*rooms: str) -> list[CaseLaw]:
    """The laws of Tier 1 that stand in these rooms."""
    return [law for law in case_laws(1).values() if law.check.__module__.rpartition(".")[2] in rooms]


def our_trainer(scratch: Path) -> Trainer:
    """Our own trainer in this process, in float64, which here is its own oracle."""
    return Trainer(inside("reference", scratch), scratch)


def see_it_hold(law: CaseLaw, trainer: Trainer, *, times: float) -> None:
    """A law holds on a share of its cases, and does not stay unjudged."""
    judgement = judge(law, trainer, Effort(times=times))
    assert judgement.word == "holds", judgement


def see_it_broken(planted: str, law: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that is planted in our trainer is noticed, in a case that is made small."""
    # What is planted is taken out again when the test ends.
    monkeypatch.setattr(fault, "setattr", monkeypatch.setattr, raising=False)
    trainer = our_trainer(scratch)
    fault.faults()[planted].apply()
    judgement = judge(case_laws()[law], trainer, Effort(shrink_seconds=0.2))
    assert judgement.word == "broken", judgement
    assert judgement.case is not None
