"""Tier 3: the whole chain of our own trainer, from a model's name to a served model, each step a judgement."""

import os
from collections.abc import Callable
from pathlib import Path

from finetune.models.locate import SHIPPED
from finetune.verify.chain import ChainStep, clear_chain, run_chain
from finetune.verify.suite.verdicts import LawResult, Word

BACKENDS = ("torch", "mlx")
_STATEMENT = "The whole chain, from a model's name to a served model that answers as its run did, can be gone through."
_WORDS: dict[str, Word] = {"done": "holds", "skipped": "not applicable", "failed": "broken"}


def judge_chain(name: str, folder: Path, tell: Callable[[LawResult], None]) -> tuple[LawResult, ...]:
    """Go through the chain with one of our backends; of any other trainer it is not applicable.

    `FT_E2E_MODEL_ID` names the model, by default a shipped one.

    Args:
        folder: everything that is made lies there; what an earlier chain left there is removed.
    """
    if name not in BACKENDS:
        why = f"the chain goes through `ft` itself, with {' or '.join(BACKENDS)}"
        judgement = LawResult("chain.whole", _STATEMENT, "not applicable", why=why)
        tell(judgement)
        return (judgement,)
    clear_chain(folder)
    found = run_chain(os.environ.get("FT_E2E_MODEL_ID") or SHIPPED[0], folder, backend=name)
    judgements = tuple(map(_judgement, found.steps))
    for each in judgements:
        tell(each)
    return judgements


def _judgement(step: ChainStep) -> LawResult:
    id = f"chain.{step.name.lower().replace(' ', '-')}"
    statement = f"The step of the chain named {step.name} is done, and what it made is what was trained."
    expected, got = ("it is done", step.why) if step.outcome == "failed" else ("", "")
    why = step.why if step.outcome == "skipped" else ""
    word = _WORDS[step.outcome]
    return LawResult(id, statement, word, cases=1, why=why, expected=expected, got=got, seconds=round(step.seconds, 3))
