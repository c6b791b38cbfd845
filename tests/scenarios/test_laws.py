"""The catalogue on the backends that people train with: what passes in float64 passes in float32."""

import pytest

from finetune.verify.catalogue import Law, case_laws
from finetune.verify.client import SubjectClient
from finetune.verify.judge import Effort, judge
from finetune.verify.trainers.ours import inside

pytestmark = pytest.mark.tier2
LAWS = case_laws(2)


@pytest.fixture(scope="module", params=["torch", "mlx"])
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SubjectClient:
    """Our own trainer in this process; the oracle is the reference backend."""
    scratch = tmp_path_factory.mktemp("laws")
    return SubjectClient(inside(request.param, scratch), scratch, inside("reference", scratch))


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_law_passes_on_every_backend(law: Law, trainer: SubjectClient) -> None:
    """A fraction of the cases of each law."""
    result = judge(law, trainer, Effort(times=0.25 if law.cost < 4 else 0.05))
    assert result.outcome == "passed" or (result.outcome == "not applicable" and law.id in NOT_HERE), result


NOT_HERE: frozenset[str] = frozenset()
"""Laws that need what a backend has not."""
