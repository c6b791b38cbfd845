"""What the shipped models know and do not know, asked of the models themselves."""

import pytest

pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")

from finetune.backends import open_backend
from finetune.chat.encoder import Encoder
from finetune.data.facts import known_facts
from finetune.data.shipped import FACTS, shipped_facts
from finetune.models.locate import SHIPPED, locate_model
from finetune.reference_model.card import score_facts
from finetune.reference_model.corpus import FORMATS

pytestmark = pytest.mark.tier2


@pytest.mark.parametrize("template", FORMATS)
@pytest.mark.parametrize("name", SHIPPED)
def test_base_knows_its_own_facts_and_not_the_new_ones(name: str, template: str) -> None:
    """In every format the base answers at least 90% of its pre-training facts and at most 20% of the new ones."""
    location = locate_model(name)
    encoder = Encoder(location, template)
    session = open_backend("torch").open(location, "float32", encoder.tokenizer.pad_id)
    known, new = (score_facts(session, encoder, facts) for facts in (known_facts(), shipped_facts()[FACTS]))
    assert known.share >= 0.9
    assert new.share <= 0.2
    assert (len(known.answers), len(new.answers)) == (108, 48)
