"""The catalogue on the backends that people train with: what passes in float64 passes in float32."""

import pytest
from hypothesis import settings

from finetune.verify.catalogue import Law, case_laws
from finetune.verify.client import SubjectClient
from finetune.verify.judge import Effort, judge
from finetune.verify.trainers.ours import inside

# A library may warn of what a law hands it, and the law decides: in this process a warning is no answer.
pytestmark = [pytest.mark.tier2, pytest.mark.filterwarnings("ignore")]
LAWS = case_laws(2)
HURRIED = settings.get_current_profile_name().startswith("fast")
MINUTES = 30
"""The cost from which a case takes minutes: HYPOTHESIS_PROFILE=ci has time for it."""


@pytest.fixture(scope="module", params=["torch", "mlx"])
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SubjectClient:
    """Our own trainer in this process; the oracle is the reference backend."""
    scratch = tmp_path_factory.mktemp("laws")
    return SubjectClient(inside(request.param, scratch), scratch, inside("reference", scratch))


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_law_passes_on_every_backend(law: Law, trainer: SubjectClient) -> None:
    """A fraction of the cases of each law."""
    if HURRIED and law.cost >= MINUTES:
        pytest.skip("takes minutes: HYPOTHESIS_PROFILE=ci has time for it")
    result = judge(law, trainer, Effort(times=0.25 if law.cost < 4 else 0.05))
    assert result.outcome == "passed", result
