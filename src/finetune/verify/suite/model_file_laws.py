"""Laws of reading a model: what its files say is what is computed, however they spell it."""

import json
from typing import Annotated, Literal

import numpy as np
from hypothesis import strategies as st
from pydantic import Field

from finetune.verify.doors.answers import Logits
from finetune.verify.recipes import Recipe
from finetune.verify.suite.cases import PLAIN, TINY
from finetune.verify.suite.catalogue import law
from finetune.verify.suite.trainer import Trainer
from finetune.verify.suite.verdicts import check

_PROMPT = [9, 40, 77, 15, 130, 61, 22]


class Spelling(Recipe):
    """The base of a model's rotary positions, and where its `config.json` has it.

    `rope_parameters` is where transformers writes it since 5.0, and `rope_theta` where it was before.
    """

    theta: Annotated[float, Field(gt=1)]
    key: Literal["rope_theta", "rope_parameters"]


_SPELLINGS = st.builds(
    Spelling, theta=st.sampled_from([10.0, 500_000.0]), key=st.sampled_from(["rope_theta", "rope_parameters"])
)


@law(
    "model.rope_spelling",
    "A model's rotary positions have the base that its config.json says, by the newer name and by the older.",
    needs=["logits"],
    oracle="the logits of our trainer in float64, which reads both, as transformers does",
    cases=_SPELLINGS,
    cost=2,
    examples=4,
)
def rope_is_read(trainer: Trainer, case: Spelling) -> None:
    """The logits of a prompt are those of such positions."""
    folder = trainer.folder() / "model"
    TINY.build(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("rope_theta", None)
    config |= {case.key: case.theta if case.key == "rope_theta" else {"rope_type": "default", "rope_theta": case.theta}}
    file.write_text(json.dumps(config), encoding="utf-8")
    right, found = (
        each.tensors(each.ask("logits", Logits, model=folder, settings=PLAIN, prompts=[_PROMPT]).file)["0"]
        for each in (trainer.oracle, trainer)
    )
    away = float(np.abs(right - found).max())
    check(away <= 1e-3, expected=f"logits as with base {case.theta:g}", got=f"logits up to {away:.4f} away from them")
