"""The suite's laws of settings, rows, templates, masks and batches hold on the backends that people train with."""

from pathlib import Path

import pytest

from finetune.verify.suite.catalogue import CaseLaw
from finetune.verify.suite.judge import Effort, judge
from finetune.verify.suite.trainer import Trainer
from finetune.verify.trainers.ours import inside
from properties.test_suite_laws_rows import LAWS

pytestmark = pytest.mark.tier2


@pytest.fixture(scope="module", params=["torch", "mlx"])
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Our own trainer in this process."""
    scratch: Path = tmp_path_factory.mktemp("suite")
    return Trainer(inside(request.param, scratch), scratch)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.id)
def test_suite_law_holds_on_every_backend(law: CaseLaw, trainer: Trainer) -> None:
    """What holds in float64 holds in float32, on a fraction of the cases."""
    judgement = judge(law, trainer, Effort(times=0.25))
    assert judgement.word == "holds", judgement
